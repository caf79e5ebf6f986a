"""bn_act_pool against float64 and PyTorch's max-pool: ties, NaN, frozen statistics, gradients."""

import pytest
import torch
import torch.nn.functional as F

from kernels import stem_pool
from kernels.activation import ACTS, REFERENCE
from kernels.bn_checks import Norm
from kernels.bn_stats import batch_statistics
from kernels.launch import nhwc, record
from kernels.stem_pool import SPEC, _op, backward, bn_act_pool, forward, reference
from tests.helpers import DEVICE, LAYOUTS, check_against_float64, fresh, outputs_and_gradients
from tests.offsets import only_the_ends, zeros_but

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 24, 5, 8), (3, 72, 4, 1)]
EPS = 1e-5


def winners(inputs, act="relu", training=True):
    """Flat positions [N, C, P, Q] of the pixels the kernel chose, as max_pool2d returns them."""
    x, weight, bias, mean, var = (value.detach() for value in inputs.values())
    if training:
        mean, var = batch_statistics(x, None)[:, 0]
    _, _, index = _op(x, weight, bias, mean, var, act, training, EPS, True)
    assert index.dtype == torch.uint8
    assert (index < 9).all()
    p, q = (torch.arange(size, device=x.device) for size in index.shape[2:])
    row, column = 2 * p[:, None] - 1 + index // 3, 2 * q - 1 + index % 3
    assert ((row >= 0) & (row < x.shape[2]) & (column >= 0) & (column < x.shape[3])).all()
    return row * x.shape[3] + column


def check(inputs, generator, atol=1e-6, layout=lambda dy: dy, **options):
    """The two-error rule at the pixels the kernel chose: rounding may decide between neighbours
    in another way in each type; that the choice is right is `check_choice`'s concern."""
    flat = winners(inputs, **options)

    def at_winners(x, weight, bias, running_mean, running_var, act="relu", training=True):
        mean, var = (None, None) if training else (running_mean, running_var)
        z = REFERENCE[act](F.batch_norm(x, mean, var, weight, bias, training, 0.0, EPS))
        return z.flatten(2).gather(2, flat.to(x.device).flatten(2)).view(flat.shape)

    check_against_float64(bn_act_pool, at_winners, {**inputs, **options}, generator, atol, layout)


def check_choice(inputs, act="relu", training=True):
    """What eager PyTorch computes at the chosen pixels is its own maximum, to rounding."""
    inputs = {name: value.detach() for name, value in inputs.items()}
    x, weight, bias, mean, var = inputs.values()
    statistics = (None, None) if training else (mean, var)
    z = REFERENCE[act](F.batch_norm(x, *statistics, weight, bias, training, 0.0, EPS))
    chosen = z.flatten(2).gather(2, winners(inputs, act, training).flatten(2)).float()
    best = F.max_pool2d(z, 3, 2, 1).flatten(2).float()
    if act == "relu":
        chosen = torch.where(best > 0, chosen, best)  # any pixel stands for a window of zeros
    slack = 4 * torch.finfo(x.dtype).eps * (best.abs() + 1)
    assert (chosen >= best - slack).all()


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(training, act, dtype, generator):
    for shape in SHAPES:
        inputs = SPEC.make_inputs(shape, dtype, DEVICE, generator)
        check(inputs, generator, act=act, training=training)
        check_choice(inputs, act, training)


def test_random_shapes(generator):
    for _ in range(4):
        n, c, h, w = (
            int(torch.randint(1, limit, (), generator=generator)) for limit in (6, 90, 12, 12)
        )
        inputs = SPEC.make_inputs((n, c, h, w + 1), torch.float32, DEVICE, generator)
        check(inputs, generator, training=n * h > 1)
        check_choice(inputs, training=n * h > 1)


def test_one_pixel_frozen(generator):
    inputs = SPEC.make_inputs((1, 1, 1, 1), torch.float32, DEVICE, generator)
    check(inputs, generator, training=False)


def exact_inputs(x, act):
    """Frozen statistics that leave x as it is but for the factor 1/sqrt(1 + eps)."""
    ones = torch.ones(x.shape[1], device=DEVICE)
    inputs = {"x": nhwc(x.to(DEVICE)), "weight": ones, "bias": 0 * ones}
    return {**inputs, "running_mean": 0 * ones, "running_var": ones, "act": act}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["identity", "relu", "leaky_relu"])
@pytest.mark.parametrize("special", [None, float("nan"), float("-inf")], ids=str)
def test_ties_and_nan_as_in_pytorch(act, dtype, special, generator):
    shape = (2, 8, 7, 10)
    x = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    if special is not None:
        x[torch.rand(shape, generator=generator) < 0.3] = special
        x[0, 0] = special
    inputs = exact_inputs(x, act)
    y, _, _ = bn_act_pool(**inputs, training=False)
    z = F.batch_norm(x, torch.zeros(8), torch.ones(8), torch.ones(8), torch.zeros(8), eps=EPS)
    truth, flat = F.max_pool2d(REFERENCE[act](z), 3, 2, 1, return_indices=True)
    torch.testing.assert_close(y.cpu(), truth, equal_nan=True)
    inputs.pop("act")
    found = winners(inputs, act, training=False).cpu()
    decided = truth != 0 if act == "relu" else torch.ones_like(truth, dtype=torch.bool)
    assert torch.equal(found[decided], flat[decided])


def test_a_pixel_that_wins_four_windows_receives_all_four():
    x = torch.zeros(1, 8, 6, 6)
    x[..., 3, 3] = 5.0
    inputs = exact_inputs(x, "relu")
    inputs["x"].requires_grad_()
    y, _, _ = bn_act_pool(**inputs, training=False, eps=0.0)
    y.backward(torch.arange(9.0, device=DEVICE).view(1, 1, 3, 3).expand(1, 8, 3, 3))
    truth = torch.zeros(1, 8, 6, 6)
    truth[..., 3, 3] = 4 + 5 + 7 + 8
    assert torch.equal(inputs["x"].grad.cpu(), truth)


@pytest.mark.parametrize("case", ["far mean", "constant", "huge", "subnormal", "dead"])
def test_adversarial_channels(case, generator):
    inputs = SPEC.make_inputs((3, 16, 9, 8), torch.float32, DEVICE, generator)
    x, weight, bias, _, _ = (value.detach() for value in inputs.values())
    x[:, 3] = {
        "far mean": x[:, 3] + 100,
        "constant": torch.full_like(x[:, 3], 1.7),
        "huge": x[:, 3] * 1e6,
        "subnormal": x[:, 3] * 1e-39,
        "dead": x[:, 3],
    }[case]
    if case == "dead":
        bias[3] = -100.0
    inputs |= {"x": x.requires_grad_(), "weight": weight.requires_grad_()}
    inputs["bias"] = bias.requires_grad_()
    # the mean of a channel at 100 standard deviations has an error of 1e-5 of them in float32
    check(inputs, generator, atol=2e-5)
    y, _, _ = bn_act_pool(**inputs)
    assert torch.isfinite(y).all()
    if case == "dead":
        assert (y[:, 3] == 0).all()
        (dx,) = torch.autograd.grad(y.sum(), inputs["x"])
        assert (dx[:, 3] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradient_in_any_layout(layout, generator):
    inputs = SPEC.make_inputs((2, 24, 9, 6), torch.float32, DEVICE, generator)
    check(inputs, generator, layout=layout)


def test_stride_zero_gradient(generator):
    inputs = SPEC.make_inputs((2, 8, 5, 6), torch.float32, DEVICE, generator)
    gradients = [
        torch.autograd.grad(pull(bn_act_pool(**inputs)[0]), inputs["x"])[0]
        for pull in (torch.sum, lambda y: (y * torch.ones_like(y)).sum())
    ]
    assert torch.equal(*gradients)


def test_accepts_nchw_and_slices(generator):
    inputs = SPEC.make_inputs((2, 8, 6, 7), torch.float32, DEVICE, generator)
    x = inputs.pop("x").detach()
    wide = torch.zeros(2, 16, 6, 7, device=DEVICE)
    wide[:, ::2] = x
    truth = bn_act_pool(x, **inputs)[0]
    for view in (x.contiguous(), wide[:, ::2]):
        y = bn_act_pool(view, **inputs)[0]
        assert torch.equal(y, truth)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_statistics(generator):
    inputs = SPEC.make_inputs((3, 24, 7, 5), torch.float32, DEVICE, generator)
    kept = fresh(inputs)
    y, mean, var = bn_act_pool(**inputs)
    truth = torch.var_mean(inputs["x"].detach().double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean, truth[1].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, truth[0].float(), rtol=1e-5, atol=1e-6)
    assert not mean.requires_grad
    assert not var.requires_grad
    assert torch.equal(bn_act_pool(**inputs, stats=(mean, var))[0], y)
    assert not torch.equal(bn_act_pool(**inputs, stats=(mean + 1, var))[0], y)
    assert bn_act_pool(**inputs, training=False)[1:] == (None, None)
    for name in ("running_mean", "running_var"):
        assert torch.equal(inputs[name], kept[name])


def test_two_runs_give_the_same_bits(generator):
    inputs = SPEC.make_inputs((3, 24, 9, 8), torch.bfloat16, DEVICE, generator)
    leaves = [inputs[name] for name in ("x", "weight", "bias")]
    runs = [torch.autograd.grad(bn_act_pool(**inputs)[0].sum(), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_bf16_parameters(generator):
    inputs = SPEC.make_inputs((2, 8, 5, 6), torch.bfloat16, DEVICE, generator)
    inputs["weight"] = inputs["weight"].detach().bfloat16().requires_grad_()
    inputs["bias"] = inputs["bias"].detach().bfloat16().requires_grad_()
    check(inputs, generator, atol=4e-3)


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_empty_batch(training):
    x = torch.empty(0, 8, 4, 5, device=DEVICE, requires_grad=True)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    zeros = torch.zeros(8, device=DEVICE)
    y, _, _ = bn_act_pool(x, weight, zeros, zeros, zeros + 1, training=training)
    y.sum().backward()
    assert y.shape == (0, 8, 2, 3)
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, zeros)


def test_without_gradients_nothing_is_saved(generator):
    inputs = SPEC.make_inputs((2, 8, 5, 6), torch.float32, DEVICE, generator)
    args = [value.detach() for value in inputs.values()]
    x, norm = args[0], Norm(*args[1:], EPS)
    y, x_max, index = forward(x, norm, "relu", True)
    alone, *saved = forward(x, norm, "relu", False)
    assert torch.equal(y, alone)
    assert x_max.shape == index.shape == y.shape
    assert [tensor.numel() for tensor in saved] == [0, 0]


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_the_fallback_agrees(training, generator, monkeypatch):
    inputs = SPEC.make_inputs((2, 24, 7, 6), torch.float32, DEVICE, generator)
    leaves = [inputs[name] for name in ("x", "weight", "bias")]

    def run():
        y, _, _ = bn_act_pool(**inputs, training=training, act="leaky_relu")
        args = [value.detach() for value in inputs.values()]
        saved = _op(*args, "leaky_relu", training, EPS, True)[1:]
        return y, *torch.autograd.grad(y, leaves, y.detach() + 1), *saved

    ours = run()
    monkeypatch.setattr(stem_pool, "runs_triton", lambda tensor: False)
    for a, b in zip(ours, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_opcheck(generator):
    x, *rest = SPEC.make_inputs((2, 8, 3, 5), torch.float32, DEVICE, generator).values()
    for act, training in (("relu", True), ("gelu", False)):
        torch.library.opcheck(_op, (x, *rest, act, training, EPS, True))
    torch.library.opcheck(_op, (x.detach(), *(t.detach() for t in rest), "relu", True, EPS, False))


def test_torch_compile_goes_through(generator):
    inputs = SPEC.make_inputs((2, 8, 5, 6), torch.float32, DEVICE, generator)

    def network(**inputs):
        return bn_act_pool(**{**inputs, "x": inputs["x"] * 2})[0] + 1

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), network(**inputs))
    ours, truth = (
        torch.autograd.grad(f(**inputs).square().sum(), inputs["x"])[0] for f in (compiled, network)
    )
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8)}, r"\[N, C, H, W\]"),
        ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(1, 8, 1, 1)}, "more than one value"),
        ({"weight": torch.zeros(7)}, r"weight .* \[8\]"),
        ({"bias": torch.zeros(8, dtype=torch.int64)}, "bias .*int64"),
        ({"bias": torch.zeros(8, device="meta")}, "bias .* on meta"),
        ({"running_mean": None, "training": False}, "running_mean is missing"),
        ({"stats": (torch.zeros(8), torch.zeros(9))}, "var .*9"),
        ({"act": "swoosh"}, "one of"),
    ],
)
def test_bad_input_is_named(change, message):
    channels = {name: torch.ones(8) for name in ("weight", "bias", "running_mean", "running_var")}
    with pytest.raises(ValueError, match=message):
        bn_act_pool(**{"x": torch.zeros(2, 8, 4, 4), **channels, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_as_eager(dtype, generator):
    """Autocast leaves a BatchNorm in the dtype of its input, its parameters in float32."""
    inputs = SPEC.make_inputs((2, 8, 5, 6), dtype, DEVICE, generator)
    dy = torch.randn((2, 8, 3, 3), generator=generator)
    plain = outputs_and_gradients(bn_act_pool, fresh(inputs), dy)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours = outputs_and_gradients(bn_act_pool, fresh(inputs), dy)
        eager = outputs_and_gradients(reference, fresh(inputs), dy)
        _, *stats = bn_act_pool(**inputs)
    assert [value.dtype for value in ours.values()] == [value.dtype for value in eager.values()]
    assert all(value.dtype == torch.float32 for value in stats)
    for name, value in ours.items():
        assert torch.equal(value, plain[name])


def test_offsets_beyond_31_bits(generator, monkeypatch):
    """An image is one pixel and one window: x, the windows and dx all have more elements."""
    shape, rows = (2**25 + 3, 64, 1, 1), 11  # the smallest tiles are those of the backward: 8 rows
    nothing = torch.zeros((2, 1, 64), device=DEVICE)  # test_bn_sums has the offsets of the sums
    monkeypatch.setattr(stem_pool, "sums", lambda dy, x, norm, act: (None, nothing))
    ends = [torch.randn(rows, *shape[1:], generator=generator).half().to(DEVICE) for _ in range(2)]
    norm = Norm(*(torch.rand(64, generator=generator).to(DEVICE) + 0.5 for _ in range(4)), EPS)
    z = F.batch_norm(ends[0], norm.mean, norm.var, norm.weight, norm.bias, eps=EPS)
    s = (norm.weight * (norm.var + EPS).rsqrt())[:, None, None]
    with only_the_ends(stem_pool):
        x = zeros_but(ends[0], shape)
        y, x_max, index = forward(x, norm, "relu", True)
        torch.testing.assert_close(y[-rows:], F.relu(z), rtol=2e-3, atol=2e-3)
        assert torch.equal(x_max[-rows:], ends[0])
        assert (index[-rows:] == 4).all()
        del y
        dy = zeros_but(ends[1], shape)
        for training in (False, True):
            dx = backward(dy, x, x_max, index, norm, "relu", training)[0]
            truth = (z > 0) * ends[1] * s
            torch.testing.assert_close(dx[-rows:].float(), truth, rtol=2e-3, atol=2e-3)


def test_records_its_launches(generator):
    tiny = SPEC.make_inputs((1, 64, 2, 2), torch.bfloat16, torch.device("cpu"), generator)
    inputs = {name: value.detach().to("meta") for name, value in tiny.items()}
    inputs["x"] = torch.empty(SPEC.shapes[0], dtype=torch.bfloat16, device="meta")
    with record() as recording:
        SPEC.launch(**inputs)
    names = [launch.kernel.__name__ for launch in recording.launches]
    pulled_back = ["_sums_kernel", "_coefficients_kernel", "_backward_kernel"]
    assert names == ["_forward_kernel"] * 2 + pulled_back * 2
    assert (
        min(
            launch.grid[0]
            for launch in recording.launches
            if launch.kernel.__name__ != "_coefficients_kernel"
        )
        >= 2 * recording.multiprocessors
    )


def test_reference_is_pytorch(generator):
    inputs = SPEC.make_inputs((2, 8, 9, 6), torch.float32, torch.device("cpu"), generator)
    norm = torch.nn.BatchNorm2d(8)
    norm.weight.data, norm.bias.data = inputs["weight"].data, inputs["bias"].data
    module = torch.nn.Sequential(norm, torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1))
    assert torch.equal(reference(**inputs)[0], module(inputs["x"]))
