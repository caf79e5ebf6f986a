"""add_relu against float64, its gradients in every layout, its op contract and its bad inputs."""

from importlib import import_module

import pytest
import torch

from kernels import ACTS, add_relu
from kernels.add_relu import SPEC, _backward_op, _op, reference
from kernels.launch import record
from kernels.shapes import EDGES
from tests.helpers import DEVICE, LAYOUTS, check_against_float64

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_float64(act, dtype, generator):
    for shape in EDGES:
        inputs = SPEC.make_inputs(shape, dtype, DEVICE, generator)
        check_against_float64(add_relu, reference, {**inputs, "act": act}, generator)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradient_in_any_layout(layout, generator):
    inputs = SPEC.make_inputs((2, 24, 9, 5), torch.float32, DEVICE, generator)
    check_against_float64(add_relu, reference, inputs, generator, layout=layout)


def test_stride_zero_gradient(generator):
    inputs = SPEC.make_inputs((2, 8, 3, 5), torch.float32, DEVICE, generator)
    add_relu(**inputs).sum().backward()
    mask = (inputs["a"] + inputs["b"] > 0).float()
    assert torch.equal(inputs["a"].grad, mask)
    assert torch.equal(inputs["b"].grad, mask)


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_accepts_nchw_and_slices(act, generator):
    wide = torch.randn(2, 2, 16, 6, 6, generator=generator).to(DEVICE).requires_grad_()
    a, b = wide[0, :, :8], wide[1, :, ::2]
    gradients = []
    for y in (add_relu(a, b, act), reference(a, b, act)):
        gradients += torch.autograd.grad(y, wide, torch.ones_like(y).cumsum(3))
    torch.testing.assert_close(add_relu(a, b, act), reference(a, b, act))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("act", ACTS)
def test_what_is_not_finite_is_as_in_eager(act, generator):
    inputs = SPEC.make_inputs((1, 8, 2, 3), torch.float32, DEVICE, generator)
    with torch.no_grad():
        inputs["a"][0, :3, 0, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    found = []
    for function in (add_relu, reference):
        y = function(**inputs, act=act)
        found.append((y, *torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours[0, 0], theirs[0, 0], equal_nan=True)
        assert torch.equal(ours.isnan()[0, 3:], theirs.isnan()[0, 3:])


def test_empty_batch():
    a = torch.empty(0, 8, 4, 4, device=DEVICE, requires_grad=True)
    y = add_relu(a, a.detach())
    y.sum().backward()
    assert y.shape == a.grad.shape == (0, 8, 4, 4)


def test_opcheck(generator):
    inputs = SPEC.make_inputs((2, 8, 3, 5), torch.float32, DEVICE, generator)
    for act in ("relu", "gelu"):
        torch.library.opcheck(_op, (inputs["a"], inputs["b"], act))
        dy = torch.randn_like(inputs["a"])
        torch.library.opcheck(_backward_op, (dy, inputs["a"].detach(), None, act))


def test_torch_compile_goes_through(generator):
    inputs = SPEC.make_inputs((2, 8, 3, 5), torch.float32, DEVICE, generator)
    compiled = torch.compile(
        lambda a, b: add_relu(a * 2, b) + 1, fullgraph=True, backend="aot_eager"
    )
    expected = torch.relu(inputs["a"] * 2 + inputs["b"]) + 1
    assert torch.allclose(compiled(**inputs), expected)
    compiled(**inputs).sum().backward()
    assert torch.equal(inputs["a"].grad, 2 * inputs["b"].grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.zeros(2, 8, 3, 4)}, "must be alike"),
        ({"b": torch.zeros(2, 8, 3, 5, dtype=torch.float16)}, "must be alike"),
        ({"a": torch.zeros(2, 8)}, r"\[N, C, H, W\]"),
        ({"a": torch.zeros(2, 8, 3, 5).double()}, "not torch.float64"),
        ({"act": "swoosh"}, "one of"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = {"a": torch.zeros(2, 8, 3, 5), "b": torch.zeros(2, 8, 3, 5), "act": "relu"}
    with pytest.raises(ValueError, match=message):
        add_relu(**{**inputs, **change})


def test_records_its_launches():
    inputs = {name: torch.empty(SPEC.shapes[0], device="meta") for name in ("a", "b")}
    with record() as recording:
        SPEC.launch(**inputs)
    names = [launch.kernel.__name__ for launch in recording.launches]
    assert names == ["_forward_kernel", "_backward_kernel"] * 2


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_without_triton_the_op_is_the_reference(act, generator, monkeypatch):
    monkeypatch.setattr(import_module("kernels.add_relu"), "runs_triton", lambda x: False)
    inputs = SPEC.make_inputs((2, 8, 3, 5), torch.float32, DEVICE, generator)
    check_against_float64(add_relu, reference, {**inputs, "act": act}, generator)
