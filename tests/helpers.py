"""What the room tests share: the two-error rule and running a function with all its gradients."""

from collections.abc import Callable
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    dy_transform: Callable[[torch.Tensor], torch.Tensor] = lambda dy: dy,
) -> None:
    """The two-error rule for the output and the gradient of every input that requires one.

    In 16 bits the rule gets an eighth of a unit in the last place: over the few values of a small
    test eager's error can be smaller by luck than its rounding explains.
    """
    shape = reference(**as_float64(inputs))
    shape = (shape[0] if isinstance(shape, tuple) else shape).shape
    dtype = next(v.dtype for v in inputs.values() if isinstance(v, torch.Tensor))
    dy = torch.randn(shape, generator=generator).to(dtype)
    truth = outputs_and_gradients(reference, as_float64(inputs), dy)
    eager = outputs_and_gradients(reference, fresh(inputs), dy)
    ours = outputs_and_gradients(fused, fresh(inputs), dy_transform(dy.to(DEVICE)))
    atol = max(atol, torch.finfo(dtype).eps / 8)
    for name, value in truth.items():
        assert_two_errors(ours[name], eager[name], value, name, atol)
