"""group_norm_act against float64: every gradient, odd shapes, far means, its contract as an op."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from kernels.activation import ACTS
from kernels.group_norm_act import SPEC, _op, group_norm_act, reference
from kernels.launch import record, run
from tests.helpers import DEVICE, LAYOUTS, check_against_float64

pytestmark = pytest.mark.usefixtures("poisoned")
# the package's attribute of this name is the function
room = importlib.import_module("kernels.group_norm_act")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8, 1, 2, 4), (2, 72, 7, 5, 3), (3, 136, 3, 1, 1)]  # N C H W G


def make_inputs(shape, dtype, generator, residual=True):
    *size, groups = shape
    inputs = SPEC.make_inputs(tuple(size), dtype, DEVICE, generator)
    if not residual:
        inputs.pop("residual")
    return {**inputs, "num_groups": groups}


def leaves(inputs):
    return [value for value in inputs.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(residual, act, dtype, generator):
    for shape in SHAPES:
        inputs = make_inputs(shape, dtype, generator, residual)
        check_against_float64(group_norm_act, reference, {**inputs, "act": act}, generator, 2e-6)


def test_random_shapes(generator):
    for _ in range(6):
        n, groups, group, h, w = (
            int(torch.randint(1, limit, (), generator=generator)) for limit in (6, 9, 20, 12, 12)
        )
        inputs = make_inputs((n, groups * group, h, w + 1, groups), torch.float32, generator)
        check_against_float64(group_norm_act, reference, {**inputs, "act": "silu"}, generator, 1e-5)


def test_one_value_a_group(generator):
    inputs = make_inputs((2, 8, 1, 1, 8), torch.float32, generator, residual=False)
    y = group_norm_act(**inputs)
    gradients = torch.autograd.grad(y.sum(), [inputs[name] for name in ("x", "weight", "bias")])
    bias = inputs["bias"].detach()
    assert torch.equal(y.flatten(1), bias.relu().expand(2, 8))  # xhat is 0
    assert torch.equal(gradients[0], torch.zeros_like(inputs["x"]))
    assert torch.equal(gradients[2], 2.0 * (bias > 0))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("case", ["far mean", "constant", "huge", "subnormal"])
def test_adversarial_groups(case, groups, generator):
    inputs = make_inputs((2, 16, 9, 8, groups), torch.float32, generator)
    x = inputs["x"].detach()
    x[0, :4] = {
        "far mean": x[0, :4] + 100,
        "constant": torch.full_like(x[0, :4], 1.7),
        "huge": x[0, :4] * 1e6,
        "subnormal": x[0, :4] * 1e-39,
    }[case]
    if case == "far mean":
        x[0] = torch.randn(x[0].shape, generator=generator).to(DEVICE) + 100
    inputs["x"] = x.requires_grad_()
    # float32 keeps a mean of 100 standard deviations to 1e-5 of them
    check_against_float64(group_norm_act, reference, inputs, generator, atol=3e-5)


def test_variance_far_from_zero(generator):
    x = torch.randn(2, 16, 40, 33, generator=generator) + 100
    ones = torch.ones(16, device=DEVICE)
    _, mean, rstd = _op(x.to(DEVICE), 4, ones, ones, None, "relu", 0.0)
    var, middle = torch.var_mean(x.double().view(2, 4, -1), 2, correction=0)
    assert (rstd.cpu().double() ** -2 / var - 1).abs().max() < 2e-6
    assert (mean.cpu().double() - middle).abs().max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradient_in_any_layout(layout, generator):
    inputs = make_inputs((2, 24, 9, 5, 3), torch.float32, generator)
    check_against_float64(group_norm_act, reference, inputs, generator, 2e-6, layout=layout)


def test_stride_zero_gradient(generator):
    inputs = make_inputs((2, 8, 3, 5, 2), torch.float32, generator)
    y = group_norm_act(**inputs)
    y.sum().backward()
    assert torch.equal(inputs["residual"].grad, (y > 0).float())


def test_accepts_nchw_and_slices(generator):
    inputs = make_inputs((2, 8, 6, 7, 2), torch.float32, generator)
    x = inputs.pop("x").detach()
    wide = torch.zeros(2, 16, 6, 7, device=DEVICE)
    wide[:, ::2] = x
    truth = group_norm_act(x, **inputs)
    for view in (x.contiguous(), wide[:, ::2]):
        y = group_norm_act(view, **inputs)
        assert torch.equal(y, truth)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_two_runs_give_the_same_bits(generator):
    inputs = make_inputs((3, 24, 9, 8, 3), torch.bfloat16, generator)
    runs = [
        torch.autograd.grad(group_norm_act(**inputs).square().sum(), leaves(inputs))
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_parameters_in_the_type_of_x(generator):
    inputs = make_inputs((2, 8, 5, 6, 2), torch.bfloat16, generator)
    for name in ("weight", "bias"):
        inputs[name] = inputs[name].detach().bfloat16().requires_grad_()
    check_against_float64(group_norm_act, reference, inputs, generator, atol=4e-3)


def test_empty_batch():
    x = torch.empty(0, 8, 4, 4, device=DEVICE, requires_grad=True)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    y = group_norm_act(x, 2, weight, torch.zeros_like(weight))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 8, 4, 4)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_the_fallback_agrees(residual, generator, monkeypatch):
    inputs = make_inputs((2, 24, 7, 6, 3), torch.float32, generator, residual)

    def outputs():
        y = group_norm_act(**inputs)
        args = (inputs["x"], 3, inputs["weight"], inputs["bias"], inputs.get("residual"))
        with torch.no_grad():
            saved = _op(*args, "relu", 1e-5)[1:]
        return y, *torch.autograd.grad(y, leaves(inputs), y.detach() + 1), *saved

    ours = outputs()
    monkeypatch.setattr(room, "runs_triton", lambda tensor: False)
    for a, b in zip(ours, outputs(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_opcheck(generator):
    x, groups, weight, bias, residual = make_inputs(
        (2, 8, 3, 5, 2), torch.float32, generator
    ).values()
    for act, addend in (("relu", residual), ("gelu", None)):
        torch.library.opcheck(_op, (x, groups, weight, bias, addend, act, 1e-5))


def test_torch_compile_goes_through(generator):
    inputs = make_inputs((2, 8, 5, 6, 2), torch.float32, generator)

    def network(**inputs):
        return group_norm_act(**{**inputs, "x": inputs["x"] * 2}) + 1

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), network(**inputs))
    ours, truth = (
        torch.autograd.grad(f(**inputs).square().sum(), leaves(inputs)) for f in (compiled, network)
    )
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8)}, r"\[N, C, H, W\]"),
        ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.float64)}, "float64"),
        ({"num_groups": 3}, "divide the 8 channels"),
        ({"num_groups": 0}, "divide the 8 channels"),
        ({"weight": torch.zeros(7)}, r"weight \(7,\)"),
        ({"bias": torch.zeros(8, dtype=torch.bfloat16)}, "bias .*bfloat16"),
        ({"bias": torch.zeros(8, device="meta")}, "bias .* on meta"),
        ({"residual": torch.zeros(2, 8, 4, 5)}, "like x"),
        ({"residual": torch.zeros(2, 8, 4, 4).half()}, "like x"),
        ({"act": "swoosh"}, "one of"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = {
        "x": torch.zeros(2, 8, 4, 4),
        "num_groups": 2,
        "weight": torch.ones(8),
        "bias": torch.zeros(8),
    }
    with pytest.raises(ValueError, match=message):
        group_norm_act(**{**inputs, **change})


def test_fills_a_gpu_at_batch_32(generator):
    for shape in SPEC.shapes:
        tiny = SPEC.make_inputs((1, shape[1], 1, 2), torch.bfloat16, torch.device("cpu"), generator)
        inputs = {
            name: value.detach().to("meta") if isinstance(value, torch.Tensor) else value
            for name, value in tiny.items()
        }
        for name in ("x", "residual"):
            inputs[name] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        with record() as recording:
            SPEC.launch(**inputs)
        names = [launch.kernel.__name__ for launch in recording.launches]
        forward = ["_statistics_kernel", "_merge_statistics_kernel", "_forward_kernel"]
        assert names == 2 * [*forward, "_sums_kernel", "_merge_sums_kernel", "_backward_kernel"]
        for launch in recording.launches:
            programs = launch.grid[0] * (launch.grid[1] if len(launch.grid) > 1 else 1)
            assert programs >= 3 * recording.multiprocessors


def test_offsets_beyond_31_bits(generator, tmp_path):
    """The first rows of three images, the last of which starts at element 2.1e9; of the tensors
    only the pages that are touched exist."""
    n, c, groups, rows, hw = 3, 8, 2, 256, 2**27 + 5

    def far(name):
        size = (n - 1) * hw * c + rows * c
        if DEVICE.type == "cuda":
            memory = torch.zeros(size, dtype=torch.float16, device=DEVICE)
        else:
            path = str(tmp_path / name)
            memory = torch.from_file(path, shared=True, size=size, dtype=torch.float16)
        return memory.as_strided((n, rows, c), (hw * c, c, 1))

    def first_tiles(x, out, hw):
        """What every kernel makes of the first tile of every image of hw rows."""
        slices = -(-hw // rows)
        statistics = torch.zeros(n, 2, slices, c, device=DEVICE)
        sums = torch.zeros(n, slices, 2, c, device=DEVICE)
        tile = {"BLOCK_M": rows, "BLOCK_C": c}
        run(room._statistics_kernel, (1, n), x, statistics, hw, c, slices, **tile)
        sizes, act = (hw, c, groups), {"ACT": "silu", **tile}
        run(room._forward_kernel, (1, n), x, x, *channels, out, *sizes, **act)
        y = out.clone()
        run(room._sums_kernel, (1, n), x, x, x, *channels, out, sums, *sizes, slices, **act)
        dz = out.clone()
        run(room._backward_kernel, (1, n), x, x, *channels, c1, c2, out, *sizes, **act)
        return y, dz, out.clone(), statistics[:, :, 0], sums[:, 0]

    weight, bias = torch.randn(2, c, generator=generator).to(DEVICE)
    mean, rstd, c1, c2 = torch.randn(4, n, groups, generator=generator).to(DEVICE)
    channels = (weight, bias, mean, rstd)
    near = torch.randn(n, rows, c, generator=generator).half().to(DEVICE)
    x = far("x").copy_(near)
    expected = first_tiles(near, torch.zeros_like(near), rows)
    for ours, truth in zip(first_tiles(x, far("out"), hw), expected, strict=True):
        assert torch.equal(ours, truth)


def test_reference_is_pytorch(generator):
    x = torch.randn(2, 12, 4, 5, generator=generator)
    norm = torch.nn.GroupNorm(3, 12)
    truth = F.relu(norm(x) + x)
    assert torch.equal(reference(x, 3, norm.weight, norm.bias, residual=x), truth)
