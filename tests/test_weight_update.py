"""The update of weights and their 16-bit copies against torch.optim in float64 and float32."""

import pytest
import torch

from kernels import adamw_, sgd_, weight_update
from kernels.launch import record
from kernels.weight_update import SPEC
from profiling.agree import OK
from profiling.kernel_speed import check_room
from tests.helpers import DEVICE

YES, NO = (torch.full((), value, device=DEVICE) for value in (1.0, 0.0))
# nothing, one element, odd sizes, several programs; filters in both layouts, a 1x1 filter whose
# strides say nothing
SHAPES = [(0,), (1,), (7,), (3, 0), (33, 65), (2, 2048), (5, 3, 3, 3), (24, 8, 1, 1), (8, 5, 3, 3)]
RATE = 0.1


@pytest.fixture(autouse=True)
def small_launches(monkeypatch):
    """The tensors do not fit into one launch."""
    monkeypatch.setattr(weight_update, "TENSORS", 3)


def draw(generator):
    tensors = [torch.randn(shape, generator=generator).to(DEVICE) for shape in SHAPES]
    return [*tensors[:-2], *(t.to(memory_format=torch.channels_last) for t in tensors[-2:])]


class Ours:
    """Weights under one of our updates, with its slots and copies."""

    def __init__(self, weights, kind, dtype, **options):
        self.weights = [w.clone() for w in weights]
        self.slots = [[torch.zeros_like(w) for w in weights] for _ in ("sgd", "adamw")]
        self.steps = [torch.zeros((), device=DEVICE) for _ in weights]
        self.copies = [torch.full_like(w, torch.nan, dtype=dtype) for w in weights] if dtype else []
        self.kind, self.options = kind, options

    def step(self, gradients, skip=NO):
        rate = torch.full((), RATE, device=DEVICE)
        if self.kind == "sgd":
            momenta = self.slots[0] if self.options.get("momentum") else []
            sgd_(self.weights, gradients, momenta, self.copies, rate, skip, **self.options)
        else:
            args = (*self.slots, self.steps, self.copies, rate, skip)
            adamw_(self.weights, gradients, *args, **self.options)

    def tensors(self):
        return [*self.weights, *self.slots[0], *self.slots[1], *self.steps, *self.copies]


def torchs(weights, gradients, kind, **options):
    """The weights after those steps of torch's own unfused optimizer in float64 on the CPU."""
    weights = [torch.nn.Parameter(w.cpu().double()) for w in weights]
    make = torch.optim.SGD if kind == "sgd" else torch.optim.AdamW
    optimizer = make(weights, lr=RATE, foreach=False, **options)
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.cpu().double()
        optimizer.step()
    return [w.detach() for w in weights]


KINDS = [
    ("sgd", {"weight_decay": 0.0}),
    ("sgd", {"weight_decay": 0.3, "momentum": 0.9}),
    ("sgd", {"weight_decay": 0.3, "momentum": 0.9, "nesterov": True}),
    ("adamw", {"weight_decay": 0.3}),
    ("adamw", {"weight_decay": 0.0}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_steps_are_torchs(kind, options, dtype, generator):
    """Three steps: each rounds the weight by half a unit in the last place, its update by a few of
    its own, and the rate once."""
    weights, gradients = draw(generator), [draw(generator) for _ in range(3)]
    ours = Ours(weights, kind, dtype, **options)
    for step in gradients:
        ours.step(step)
    truth = torchs(weights, gradients, kind, **options)
    unit = torch.finfo(torch.float32).eps
    for w, start, exact in zip(ours.weights, weights, truth, strict=True):
        largest = torch.maximum(start.cpu().double().abs(), exact.abs()) + 3 * RATE
        assert ((w.cpu().double() - exact).abs() <= 3 * unit * largest).all()
        assert w.numel() == 0 or (w != start).any()
    for w, copy in zip(ours.weights, ours.copies, strict=bool(ours.copies)):
        assert copy.stride() == w.stride()
        assert torch.equal(copy, w.to(dtype))


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # step 0, not stored
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_a_skipped_step_leaves_every_bit(kind, options, generator):
    """Even with gradients that are not finite, as the very first step and later."""
    weights, gradients = draw(generator), draw(generator)
    ours, plain = (Ours(weights, kind, torch.bfloat16, **options) for _ in range(2))
    bad = [torch.full_like(g, torch.nan) for g in gradients]
    for _ in range(2):
        before = [t.clone() for t in ours.tensors()]
        ours.step(bad, YES)
        for a, b in zip(ours.tensors(), before, strict=True):
            assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
        ours.step(gradients)
        plain.step(gradients)
        assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), plain.tensors(), strict=True))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_gradients_in_another_layout_are_turned(kind, generator):
    weights, gradients = draw(generator), draw(generator)
    options = {"momentum": 0.9} if kind == "sgd" else {}
    ends = []
    for turn in (lambda g: g, lambda g: torch.stack((g, g), -1)[..., 0]):
        ours = Ours(weights, kind, torch.float16, **options)
        ours.step([turn(g) for g in gradients])
        ends.append(ours.tensors())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_what_is_written_counts_as_changed(kind, generator):
    """torch's own fused optimizers do not count it."""
    weights = draw(generator)
    options = {"momentum": 0.9} if kind == "sgd" else {}
    ours = Ours(weights, kind, torch.bfloat16, **options)
    written = [*ours.weights, *ours.copies, *ours.slots[0]]
    before = [t._version for t in written]
    ours.step(draw(generator))
    assert all(t._version > version for t, version in zip(written, before, strict=True))


def test_the_reference_is_the_same_function(generator, monkeypatch):
    """What a machine without Triton runs."""
    weights, gradients = draw(generator), [draw(generator) for _ in range(2)]
    for kind, options in KINDS:
        ours, other = (Ours(weights, kind, torch.bfloat16, **options) for _ in range(2))
        for step in gradients:
            ours.step(step)
            with monkeypatch.context() as patch:
                patch.setattr(weight_update, "runs_triton", lambda _: False)
                other.step(step)
        for a, b in zip(ours.tensors(), other.tensors(), strict=True):
            close = {torch.bfloat16: 8e-3}.get(a.dtype, 1e-6)  # a unit in the last place
            torch.testing.assert_close(a, b, rtol=close, atol=1e-6)
        args = [[]] * (4 if kind == "sgd" else 6)
        (sgd_ if kind == "sgd" else adamw_)(*args, NO, NO)  # nothing to do


def test_a_network_takes_few_launches(monkeypatch):
    weights = [torch.empty(n + 1, device="meta") for n in range(37)]
    monkeypatch.undo()
    columns, scalars = [weights] * 4, (NO, NO)
    with record() as recording:
        weight_update.launch_sgd(*columns, *scalars, weight_decay=5e-4, momentum=0.9, nesterov=True)
    assert len(recording.launches) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.weights.__setitem__(0, o.weights[0].double()), "must be float32"),
        (lambda o: o.copies.__setitem__(0, o.copies[0].float()), "copies 16-bit"),
        (lambda o: o.slots[0].__setitem__(0, o.slots[0][0][:1]), "alike in shape"),
        (lambda o: o.slots[0].__setitem__(0, o.slots[0][0].t().contiguous().t()), "laid out"),
        (lambda o: o.copies.__setitem__(0, o.copies[0].t().contiguous().t()), "laid out"),
        (lambda o: o.weights.__setitem__(0, o.weights[0].half()), "must be float32"),
    ],
)
def test_what_it_does_not_take(change, message):
    ours = Ours([torch.ones(3, 4, device=DEVICE)], "sgd", torch.bfloat16, momentum=0.9)
    change(ours)
    with pytest.raises(ValueError, match=message):
        ours.step([torch.ones(3, 4, device=DEVICE)])


def test_weights_with_gaps_are_refused():
    ours = Ours([torch.ones(3, 8, device=DEVICE)], "sgd", None)
    ours.weights = [ours.weights[0][:, ::2]]
    with pytest.raises(ValueError, match="must be dense"):
        ours.step([torch.ones(3, 4, device=DEVICE)])


def test_the_speed_comparison_checks_it(generator):
    inputs = SPEC.make_inputs((2, 3), torch.bfloat16, DEVICE, generator)
    small = [40, 1, 2500]
    for name in ("weights", "gradients", "momenta", "copies"):
        inputs[name] = inputs[name][: sum(small)]
    inputs["sizes"] = small
    assert check_room(SPEC, SPEC.fused, inputs) == OK
    assert check_room(SPEC, lambda **given: 1.1 * SPEC.fused(**given), inputs) != OK
    assert SPEC.cost((32, 5), 2)["forward"].bytes == 22 * (21_287_237 - 17_024 - 5)
