"""What the room tests share: the two-error rule and running a function with all its gradients."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from train.config import DEFAULT

SGD = replace(DEFAULT.optim, optimizer="sgd", lr=0.03, weight_decay=5e-4)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# what a gradient [N, C, H, W] can look like in memory when it arrives
LAYOUTS = {
    "nchw": lambda dy: dy.contiguous(),
    "expanded": lambda dy: dy[:, :1].expand(dy.shape),
    "turned": lambda dy: dy.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": lambda dy: torch.stack((dy, dy), -1)[..., 0],
}
RELATIVE_L2 = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}

# [N, C, H, W, K, R, stride, padding]: every kind of site, odd sizes, one image, tiles half empty
CONV_SHAPES = (
    (1, 3, 19, 17, 8, 7, 2, 3),
    (2, 3, 9, 12, 24, 3, 1, 1),
    (2, 1, 7, 6, 8, 4, 3, 2),
    (3, 64, 6, 5, 64, 3, 1, 1),
    (2, 24, 9, 11, 72, 3, 2, 1),
    (1, 8, 7, 7, 136, 3, 2, 0),
    (2, 72, 5, 7, 40, 1, 1, 0),
    (5, 16, 7, 9, 32, 1, 2, 0),
    (2, 32, 4, 5, 8, 5, 1, 4),
    (1, 8, 1, 1, 8, 1, 1, 0),
)


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference to the float64 `truth`; NaN or another shape is an infinite
    error."""
    if value.shape != truth.shape or not torch.isfinite(value).all():
        return float("inf")
    if value.numel() == 0:
        return 0.0
    return (value.detach().double().cpu() - truth.detach().cpu()).abs().max().item()


def assert_two_errors(
    ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, name: str = "", atol: float = 1e-6
) -> None:
    """error against float64 <= 2 x (eager PyTorch's error in the same dtype) + atol x the truth's
    scale."""
    assert torch.isfinite(truth).all(), f"{name}: the truth itself is not finite"
    scale = truth.abs().max().item() if truth.numel() else 0.0
    bound = 2 * error(eager, truth) + atol * max(scale, 1.0)
    assert error(ours, truth) <= bound, f"{name}: error {error(ours, truth):.3e} > {bound:.3e}"


def assert_relative_l2(
    value: torch.Tensor, truth: torch.Tensor, bound: float | None = None
) -> None:
    """|value - truth| <= bound*|truth| in the 2-norm; the bound of a convolution unless given."""
    away = (value.detach().double().cpu() - truth.detach().cpu()).norm()
    assert away <= (RELATIVE_L2[value.dtype] if bound is None else bound) * truth.norm()


def as_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values in float64 on the CPU; what required a gradient requires it again."""

    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().double().cpu().requires_grad_(value.requires_grad)
        return value.cpu() if isinstance(value, torch.Tensor) else value

    return {name: convert(value) for name, value in inputs.items()}


def fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copies of the inputs that share no gradient state with the originals."""
    return {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }


def outputs_and_gradients(
    function: Callable[..., Any], inputs: dict[str, Any], dy: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Call `function(**inputs)`, pull `dy` back through its (first) output; returns {"y": ...,
    "d<name>": ...}."""
    output = function(**inputs)
    y = output[0] if isinstance(output, tuple) else output
    leaves = {n: v for n, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.device, y.dtype))
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), **named}


def check_against_float64(
    fused: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any],
    generator: torch.Generator,
    atol: float = 1e-6,
    layout: Callable[[torch.Tensor], torch.Tensor] = lambda dy: dy,
) -> None:
    """The two-error rule for the output and the gradient of every input that requires one.

    layout: makes the gradient that is pulled back out of a random dense one.
    In 16 bits the rule gets an eighth of a unit in the last place: over the few values of a small
    test eager's error can be smaller by luck than its rounding explains.
    """
    shape = reference(**as_float64(inputs))
    shape = (shape[0] if isinstance(shape, tuple) else shape).shape
    dtype = next(v.dtype for v in inputs.values() if isinstance(v, torch.Tensor))
    dy = torch.randn(shape, generator=generator).to(dtype)
    truth = outputs_and_gradients(reference, as_float64(inputs), layout(dy))
    eager = outputs_and_gradients(reference, fresh(inputs), layout(dy))
    ours = outputs_and_gradients(fused, fresh(inputs), layout(dy.to(DEVICE)))
    atol = max(atol, torch.finfo(dtype).eps / 8)
    for name, value in truth.items():
        assert_two_errors(ours[name], eager[name], value, name, atol)
