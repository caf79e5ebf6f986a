"""When a fast result may be called a result: the two-error rule for tensors of any size.

The error of a provider against the float32 (or float64) truth may be at most twice that of plain
PyTorch in the provider's own type, plus a little. No speed-up is printed for one that fails.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

OK = "ok"
SLACK_ERROR = 5e-3  # relative: a lucky yardstick must not fail an ordinary rounding error
SLACK_COSINE = 0.1


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """float32 convolutions without TF32, and without a search: a reference runs once."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = False, False
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the 2-norm; infinite for another shape or a value not finite."""
    if value.shape != truth.shape or not torch.isfinite(value).all():
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    value, truth = value.detach().double(), truth.detach().double()
    return ((value - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def cosine(value: Tensor, truth: Tensor) -> float:
    """Cosine of the angle between two tensors read as vectors; 1 where both are 0."""
    value, truth = value.detach().double().flatten(), truth.detach().double().flatten()
    lengths = (value.norm() * truth.norm()).item()
    if lengths == 0.0:
        return 1.0 if value.norm() == truth.norm() else 0.0
    return (torch.dot(value, truth) / lengths).item()


def verdict(ours: dict[str, Tensor], yardstick: dict[str, Tensor], truth: dict[str, Tensor]) -> str:
    """`ok`, or the first tensor that breaks the rule and by how much.

    Both the relative error and the angle are held to it: gradients of an untrained network in
    bfloat16 are so noisy that zeros would pass the first, and a wrong scale the second.
    """
    for name, true in truth.items():
        if name not in ours:
            return f"failed: {name} is missing"
        error, allowed = relative_error(ours[name], true), relative_error(yardstick[name], true)
        bound = 2 * allowed + SLACK_ERROR
        if not error <= bound:
            return f"failed: relative error of {name} {error:.2e} > {bound:.2e}"
        angle = 1 - cosine(ours[name], true)
        bound = 2 * (1 - cosine(yardstick[name], true)) + SLACK_COSINE
        if true.numel() > 1 and not angle <= bound:
            return f"failed: 1 - cosine of {name} {angle:.2e} > {bound:.2e}"
    return OK
