"""avg_pool against float64, its gradient in every layout, its op contract and its bad inputs."""

import importlib

import pytest
import torch

from kernels.avg_pool import SPEC, _op, avg_pool, forward, reference
from kernels.launch import record
from kernels.shapes import EDGES
from tests.helpers import DEVICE, check_against_float64

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_float64(dtype, generator):
    for shape in (*EDGES, (2, 8, 13, 11)):  # the last has more pixels than a tile
        inputs = SPEC.make_inputs(shape, dtype, DEVICE, generator)
        check_against_float64(avg_pool, reference, inputs, generator)


def test_without_triton_it_is_the_reference(monkeypatch, generator):
    module = importlib.import_module("kernels.avg_pool")
    monkeypatch.setattr(module, "runs_triton", lambda tensor: False)
    inputs = SPEC.make_inputs((2, 24, 9, 5), torch.bfloat16, DEVICE, generator)
    check_against_float64(avg_pool, reference, inputs, generator)


def test_mean_far_from_zero(generator):
    inputs = {"x": torch.randn(2, 8, 7, 7, generator=generator).to(DEVICE).add_(100.0)}
    inputs["x"].requires_grad_()
    check_against_float64(avg_pool, reference, inputs, generator, atol=1e-7)


@pytest.mark.parametrize(
    "layout",
    [
        lambda dy: dy.t().contiguous().t(),
        lambda dy: dy[:1, :1].expand(dy.shape),
        lambda dy: dy[::1],
    ],
    ids=["transposed", "expanded", "plain"],
)
def test_gradient_in_any_layout_comes_back_channels_last(layout, generator):
    x = torch.randn(3, 24, 5, 4, generator=generator).to(DEVICE).requires_grad_()
    dy = layout(torch.randn(3, 24, generator=generator).to(DEVICE))
    (dx,) = torch.autograd.grad(avg_pool(x), x, dy)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(dx, (dy / 20)[:, :, None, None].expand(x.shape))


def test_accepts_nchw_and_slices(generator):
    x = torch.randn(2, 16, 6, 6, generator=generator).to(DEVICE)[:, ::2, 1:]
    assert torch.allclose(avg_pool(x), x.mean(dim=(2, 3)), atol=1e-6)


def test_empty_batch():
    x = torch.empty(0, 8, 4, 4, device=DEVICE, requires_grad=True)
    avg_pool(x).sum().backward()
    assert x.grad.shape == x.shape


def test_more_than_65535_images_in_one_grid():
    x = torch.empty(70_000, 1, 1, 1, device="meta")
    with record() as recording:
        forward(x)
    assert recording.launches[0].grid == (70_000, 1)  # only the first axis may be that long


def test_opcheck(generator):
    inputs = SPEC.make_inputs((2, 8, 3, 5), torch.float32, DEVICE, generator)
    torch.library.opcheck(_op, (inputs["x"],))


def test_torch_compile_goes_through(generator):
    x = torch.randn(2, 8, 3, 5, generator=generator).to(DEVICE).requires_grad_()
    compiled = torch.compile(lambda x: avg_pool(x * 2) + 1, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), 2 * x.mean(dim=(2, 3)) + 1, atol=1e-6)
    compiled(x).sum().backward()
    assert torch.allclose(x.grad, torch.full_like(x, 2 / 15))


@pytest.mark.parametrize(
    ("x", "message"),
    [(torch.zeros(2, 8), r"\[N, C, H, W\]"), (torch.zeros(2, 8, 0, 3), "no pixels")],
)
def test_bad_input_is_named(x, message):
    with pytest.raises(ValueError, match=message):
        avg_pool(x)


def test_one_launch_each_way():
    with record() as recording:
        SPEC.launch(torch.empty(SPEC.shapes[0], device="meta"))
    names = [launch.kernel.__name__ for launch in recording.launches]
    assert names == ["_forward_kernel", "_backward_kernel"]
