"""bn_act against float64: every activation, residual and mode, every gradient, its op contract,
its bad inputs, and the defects of attorch it must not have."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from kernels import bn_passes, bn_sums
from kernels.activation import ACTS
from kernels.bn_act import SPEC, _backward_op, _op, bn_act, pack, reference, unpack
from kernels.bn_passes import keeps_mask
from kernels.bn_stats import Tile
from kernels.launch import record
from kernels.shapes import EDGES
from tests.helpers import DEVICE, LAYOUTS, check_against_float64, fresh, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["none", "add", "norm"]


def draw_inputs(kind, shape, dtype, generator):
    """Inputs of `bn_act` or, for "norm", of `flat`."""
    inputs = SPEC.make_inputs(shape, dtype, DEVICE, generator)
    if kind == "none":
        del inputs["residual"]
    if kind == "norm":
        r = SPEC.make_inputs(shape, dtype, DEVICE, generator)
        inputs |= {"residual": r["x"]} | {f"r_{n}": r[n] for n in list(r)[1:5]}
    return inputs


def flat(function):
    """`function` with the residual's norm as tensors r_weight ... r_running_var, eps 1e-3."""

    def call(*args, r_weight=None, r_bias=None, r_running_mean=None, r_running_var=None, **options):
        if r_weight is not None:
            r_norm = (r_weight, r_bias, r_running_mean, r_running_var, 1e-3)
            options["residual_norm"] = r_norm
        return function(*args, **options)

    return call


def check_room(inputs, generator, **options):
    check_against_float64(flat(bn_act), flat(reference), {**inputs, **options}, generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64_at_the_edges(kind, dtype, generator):
    for shape in EDGES:
        inputs = draw_inputs(kind, shape, dtype, generator)
        check_room(inputs, generator, training=False)
        if shape != (1, 1, 1, 1):
            check_room(inputs, generator)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_activation(act, kind, generator):
    for dtype in DTYPES:
        inputs = draw_inputs(kind, (2, 24, 5, 3), dtype, generator)
        check_room(inputs, generator, act=act, eps=1e-2)
        check_room(inputs, generator, act=act, training=False)


@pytest.mark.parametrize("kind", KINDS)
def test_several_tiles_a_program_and_columns(kind, generator, monkeypatch):
    monkeypatch.setitem(bn_sums.SUMS, 4, Tile(512, 4, 1))
    monkeypatch.setitem(bn_passes.FORWARD, 4, Tile(512, 4))
    monkeypatch.setitem(bn_passes.APPLY, 4, Tile(1024, 4))
    for training in (True, False):
        inputs = draw_inputs(kind, (3, 75, 9, 7), torch.float32, generator)
        check_room(inputs, generator, training=training)


@pytest.mark.parametrize("kind", KINDS)
def test_far_from_zero(kind, generator):
    inputs = draw_inputs(kind, (4, 16, 12, 12), torch.float32, generator)
    with torch.no_grad():
        inputs["x"] += 200  # mean / std = 100
    check_room(inputs, generator)


@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_channels(kind, generator):
    inputs = draw_inputs(kind, (2, 16, 6, 6), torch.float32, generator)
    with torch.no_grad():
        x = inputs["x"]
        x[:, 1] = 0.5  # constant: the variance is 0
        x[:, 2] *= 1e4
        x[:, 3] *= 1e-39  # subnormal
        inputs["weight"][4] = 0.0
        inputs["bias"][5] = -1e3  # dead
    check_room(inputs, generator)


def test_half_precision_parameters(generator):
    for dtype in (torch.bfloat16, torch.float16):
        inputs = draw_inputs("add", (2, 24, 5, 3), torch.float32, generator)
        inputs = {n: t.detach().to(dtype).requires_grad_() for n, t in inputs.items()}
        running = {n: inputs[n].detach() for n in ("running_mean", "running_var")}
        check_room({**inputs, **running}, generator)


def test_mask_uses_the_rounded_sum():
    # s*x + t = 1e-9 is 0 in float16, where eager's ReLU passes no gradient
    x = torch.zeros(1, 8, 2, 1, device=DEVICE, dtype=torch.float16, requires_grad=True)
    zero, one = torch.zeros(8, device=DEVICE), torch.ones(8, device=DEVICE)
    for residual in (None, torch.zeros_like(x)):
        y, *_ = bn_act(x, one, zero + 1e-9, zero, one, residual=residual, training=False)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert not y.any()
        assert not dx.any()


@pytest.mark.parametrize("kind", KINDS)
def test_returns_the_biased_statistics(kind, generator):
    inputs = draw_inputs(kind, (2, 24, 9, 5), torch.float32, generator)
    _, *found = flat(bn_act)(**inputs)
    tensors = [inputs["x"], inputs["residual"]] if kind == "norm" else [inputs["x"]]
    for x in tensors:
        var, mean = torch.var_mean(x.detach().double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(found.pop(0), mean.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.pop(0), var.float(), rtol=1e-5, atol=0)
    assert not found
    nothing = (None,) * (4 if kind == "norm" else 2)
    assert flat(bn_act)(**inputs, training=False)[1:] == nothing


@pytest.mark.parametrize("kind", KINDS)
def test_delivered_statistics_are_those_of_x(kind, generator):
    inputs = draw_inputs(kind, (2, 24, 9, 5), torch.float32, generator)
    inputs |= {n: None for n in inputs if "running" in n}
    y, *stats = flat(bn_act)(**inputs)
    delivered = {"stats": tuple(stats[:2]), "residual_stats": tuple(stats[2:]) or None}
    leaves = [t for t in inputs.values() if t is not None]
    dy = torch.randn(y.shape, generator=generator).to(DEVICE)
    expected = torch.autograd.grad(y, leaves, dy)
    given, *handed = flat(bn_act)(**inputs, **delivered)
    assert torch.equal(given, y)
    assert all(a is b for a, b in zip(handed, stats, strict=True))
    for a, b in zip(torch.autograd.grad(given, leaves, dy), expected, strict=True):
        assert torch.equal(a, b)


def test_same_bits_every_time(generator):
    inputs = draw_inputs("norm", (2, 24, 30, 30), torch.bfloat16, generator)

    def run():
        y, *stats = flat(bn_act)(**inputs)
        leaves = [t for t in inputs.values() if t.requires_grad]
        return y, *stats, *torch.autograd.grad(y.float().square().sum(), leaves)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def saved_bytes(inputs, **options):
    """Bytes that the backward keeps beside the inputs themselves, and all bytes that it keeps."""
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        flat(bn_act)(**inputs, **options)
    pointers = {t.untyped_storage().data_ptr() for t in inputs.values()}
    return sum(n for p, n in kept.items() if p not in pointers), sum(kept.values())


def test_saves_one_bit_an_element(generator):
    inputs = draw_inputs("add", (2, 64, 8, 8), torch.bfloat16, generator)
    x, channels = inputs["x"].nbytes, 64 * 4
    for act, extra, total in [
        ("relu", x // 16, x + x // 16),
        ("leaky_relu", x // 16, x + x // 16),
        ("identity", 0, x),
        ("gelu", 0, 2 * x),
    ]:
        own, everything = saved_bytes(inputs, act=act)
        assert own <= extra + 4 * channels
        assert everything <= total + 8 * channels


def test_mask_bits(generator):
    positive = torch.randn((2, 21, 3, 5), generator=generator) > 0
    assert torch.equal(unpack(pack(positive), positive.shape), positive)
    inputs = draw_inputs("add", (2, 21, 3, 5), torch.float32, generator)
    norm = [inputs[n] for n in ("weight", "bias", "running_mean", "running_var")]
    args = ("leaky_relu", False, 1e-5, 1e-5)
    y, mask = _op(inputs["x"], *norm, inputs["residual"], *(None,) * 4, *args)
    assert torch.equal(mask, pack(y > 0))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradient_in_any_layout(layout, generator):
    for kind in KINDS:
        inputs = draw_inputs(kind, (2, 24, 9, 5), torch.float32, generator)
        check_against_float64(flat(bn_act), flat(reference), inputs, generator, layout=layout)


def test_stride_zero_gradient(generator):
    inputs = draw_inputs("add", (2, 8, 3, 5), torch.float32, generator)
    y, *_ = bn_act(**inputs)
    y.sum().backward()
    assert torch.equal(inputs["residual"].grad, (y > 0).float())
    torch.testing.assert_close(inputs["bias"].grad, (y > 0).float().sum((0, 2, 3)))


def test_accepts_nchw_and_slices(generator):
    inputs = draw_inputs("add", (2, 24, 6, 6), torch.float32, generator)
    expected = bn_act(**inputs)[0]
    wide = torch.stack((inputs["x"], inputs["x"]), dim=2).flatten(1, 2)
    inputs |= {"x": wide[:, ::2], "residual": inputs["residual"].contiguous()}
    y = bn_act(**inputs)[0]
    assert torch.equal(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind, generator):
    inputs = draw_inputs(kind, (0, 8, 4, 4), torch.float32, generator)
    y, *stats = flat(bn_act)(**inputs)
    y.sum().backward()
    assert y.shape == inputs["x"].grad.shape == (0, 8, 4, 4)
    assert not inputs["weight"].grad.any()
    assert not any(s.any() for s in stats)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ["relu", "gelu", "identity"])
def test_opcheck(kind, act, generator):
    inputs = draw_inputs(kind, (2, 12, 3, 5), torch.float32, generator)
    residual = inputs.pop("residual", None)
    tensors = [*list(inputs.values())[:5], residual, *list(inputs.values())[5:]]
    tensors += [None] * (10 - len(tensors))
    args = (*tensors, act, kind == "add", 1e-5, 1e-5)
    torch.library.opcheck(_op, args)
    y, mask = _op(*args)
    if keeps_mask(act, kind):
        tensors[5] = None
    tensors = [t if t is None else t.detach() for t in tensors]
    torch.library.opcheck(_backward_op, (y.detach(), *tensors, mask, kind, *args[10:]))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile_goes_through(kind, generator):
    inputs = draw_inputs(kind, (2, 12, 3, 5), torch.float32, generator)
    leaves = [t for t in inputs.values() if t.requires_grad]
    compiled = torch.compile(flat(bn_act), fullgraph=True, backend="aot_eager")
    for training in (True, False):
        y, expected = (f(**inputs, training=training)[0] for f in (compiled, flat(bn_act)))
        assert torch.equal(y, expected)
        gradients = (torch.autograd.grad(z.square().sum(), leaves) for z in (y, expected))
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)


def test_without_triton_the_op_is_the_reference(generator, monkeypatch):
    for room in ("kernels.bn_act", "kernels.bn_stats"):  # kernels.bn_act is also a function
        monkeypatch.setattr(import_module(room), "runs_triton", lambda x: False)
    for kind in KINDS:
        for act in ACTS:
            inputs = draw_inputs(kind, (2, 12, 5, 3), torch.float32, generator)
            check_room(inputs, generator, act=act)
            check_room(inputs, generator, act=act, training=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_as_eager(dtype, kind, generator):
    """Autocast leaves a BatchNorm in the dtype of its input, its parameters in float32."""
    inputs = draw_inputs(kind, (2, 24, 5, 3), dtype, generator)
    dy = torch.randn(inputs["x"].shape, generator=generator)
    plain = outputs_and_gradients(flat(bn_act), fresh(inputs), dy)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours = outputs_and_gradients(flat(bn_act), fresh(inputs), dy)
        eager = outputs_and_gradients(flat(reference), fresh(inputs), dy)
        _, *stats = flat(bn_act)(**inputs)
    assert [value.dtype for value in ours.values()] == [value.dtype for value in eager.values()]
    assert all(value.dtype == torch.float32 for value in stats)
    for name, value in ours.items():
        assert torch.equal(value, plain[name])


def bad(**change):
    c = torch.ones(8)
    x = torch.zeros(2, 8, 3, 5)
    return {"x": x, "weight": c, "bias": c, "running_mean": c, "running_var": c, **change}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (bad(act="swoosh"), "act must be one of"),
        (bad(x=torch.zeros(2, 8)), r"\[N, C, H, W\]"),
        (bad(x=torch.zeros(2, 8, 3, 5).double()), "x must be float32"),
        (bad(x=torch.zeros(1, 8, 1, 1)), "more than one value per channel"),
        (bad(weight=torch.ones(7)), r"weight \(7,\)"),
        (bad(bias=torch.ones(8).double()), "bias .*float64"),
        (bad(weight=torch.ones(8, device="meta")), "weight .*meta"),
        (bad(running_mean=None, training=False), "running_mean is missing"),
        (bad(residual=torch.zeros(2, 8, 3, 4)), "residual .*must be like x"),
        (bad(residual=torch.zeros(2, 8, 3, 5).half()), "residual .*must be like x"),
        (bad(residual_norm=(*[torch.ones(8)] * 4, 1e-5)), "needs a residual"),
        (bad(stats=(torch.ones(8), torch.ones(4))), r"var \(4,\)"),
        (
            bad(residual=torch.zeros(2, 8, 3, 5), residual_norm=(*[torch.ones(4)] * 4, 1e-5)),
            "residual weight",
        ),
    ],
)
def test_bad_input_is_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        bn_act(**inputs)


def test_launches(generator):
    """Three launches forward, three backward (two with constant statistics), for every kind; then
    the sums of two gradients, and the pass that adds what comes past the norm. Thousands of
    partials are folded first."""
    from kernels.bn_act import _launch

    x = torch.empty(SPEC.shapes[0], device="meta", dtype=torch.bfloat16)
    with record() as recording:
        _launch(x, *(torch.empty(x.shape[1], device="meta") for _ in range(4)), x)
    names = [launch.kernel.__name__ for launch in recording.launches]
    statistics = ["_stats_kernel", "_merge_kernel"]
    training = ["_sums_kernel", "_coefficients_kernel", "_apply_kernel"]
    kind = ["_forward_kernel", *training, *training[:2], "_sums_kernel"]
    more = ["_apply_kernel"] * 2
    assert names == 2 * statistics + 3 * kind + more + ["_fold_kernel", "_coefficients_kernel"]
    wide = ("_stats_kernel", "_forward_kernel", "_sums_kernel", "_apply_kernel")
    assert all(x.grid[0] >= 132 for x in recording.launches if x.kernel.__name__ in wide)


# Defects of attorch: an eval-mode backward that reads buffers nobody wrote, one program for each
# channel (test_launches), and a residual block that ends without its ReLU.


def test_eval_backward_after_no_training_step(generator):
    inputs = draw_inputs("add", (2, 24, 5, 7), torch.float32, generator)
    y, *_ = bn_act(**inputs, training=False)
    y.sum().backward()
    scale = inputs["weight"] / (inputs["running_var"] + 1e-5).sqrt()
    expected = (y > 0) * scale[None, :, None, None]
    torch.testing.assert_close(inputs["x"].grad, expected.detach())


def test_residual_is_added_before_the_activation(generator):
    inputs = draw_inputs("add", (2, 24, 5, 7), torch.float32, generator)
    y, *_ = bn_act(**inputs)
    alone = F.batch_norm(inputs["x"], None, None, inputs["weight"], inputs["bias"], True)
    torch.testing.assert_close(y, F.relu(alone + inputs["residual"]))
    assert (y >= 0).all()
