"""add_relu against float64, its gradients in every layout, its op contract and its bad inputs."""

from importlib import import_module

import pytest
import torch

from kernels import ACTS, add_relu
from kernels.add_relu import SPEC, _op, reference
from kernels.launch import record
from kernels.shapes import EDGES
from tests.helpers import DEVICE, check_against_float64

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_float64(act, dtype, generator):
    for shape in EDGES:
        inputs = SPEC.make_inputs(shape, dtype, DEVICE, generator)
        check_against_float64(add_relu, reference, {**inputs, "act": act}, generator)


@pytest.mark.parametrize(
    "layout",
    [
        lambda dy: dy.contiguous(),
        lambda dy: dy[:1, :1, :1, :1].expand(dy.shape) * 0 + dy,
        lambda dy: dy.flip(3).flip(3),
    ],
    ids=["nchw", "expanded", "flipped"],
)
def test_gradient_in_any_layout(layout, generator):
    inputs = SPEC.make_inputs((2, 24, 9, 5), torch.float32, DEVICE, generator)
    check_against_float64(add_relu, reference, inputs, generator, dy_transform=layout)


def test_stride_zero_gradient(generator):
    inputs = SPEC.make_inputs((2, 8, 3, 5), torch.float32, DEVICE, generator)
    add_relu(**inputs).sum().backward()
    mask = (inputs["a"] + inputs["b"] > 0).float()
    assert torch.equal(inputs["a"].grad, mask)
    assert torch.equal(inputs["b"].grad, mask)


def test_accepts_nchw_and_slices(generator):
    a = torch.randn(2, 8, 6, 6, generator=generator).to(DEVICE)
    b = torch.randn(2, 16, 6, 6, generator=generator).to(DEVICE)[:, ::2]
    assert torch.equal(add_relu(a, b), torch.relu(a + b))


def test_empty_batch():
    a = torch.empty(0, 8, 4, 4, device=DEVICE, requires_grad=True)
    y = add_relu(a, a.detach())
    y.sum().backward()
    assert y.shape == a.grad.shape == (0, 8, 4, 4)


def test_opcheck(generator):
    inputs = SPEC.make_inputs((2, 8, 3, 5), torch.float32, DEVICE, generator)
    for act in ("relu", "gelu"):
        torch.library.opcheck(_op, (inputs["a"], inputs["b"], act))


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
    assert [launch.kernel.__name__ for launch in recording.launches] == [
        "_forward_kernel",
        "_backward_kernel",
    ]


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_without_triton_the_op_is_the_reference(act, generator, monkeypatch):
    monkeypatch.setattr(import_module("kernels.add_relu"), "runs_triton", lambda x: False)
    inputs = SPEC.make_inputs((2, 8, 3, 5), torch.float32, DEVICE, generator)
    check_against_float64(add_relu, reference, {**inputs, "act": act}, generator)
