"""16-bit copies of the weights, made by whoever updates the weights instead of by every forward.

A copy is no parameter and in no state_dict. It is read only inside `in_use`, which the training
step opens around its forward: anywhere else a network casts its weights as it always did.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from models import trunk

_in_use: dict[Tensor, Tensor] = {}


class WeightCopies:
    """Copies in `dtype` of what autocast would cast: the weights and biases of the convolutions and
    linear layers of `model` that are trained.

    `refresh` casts those whose weight has changed since: PyTorch counts changes in place, and a
    weight moved to other memory is seen by its address. It does not count what is written through
    `.data`, or by its own fused optimizers.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        weights = dict.fromkeys(p for layer in layers for p in layer.parameters(recurse=False))
        self.dtype = dtype
        self._copies: dict[Tensor, Tensor] = {
            weight: torch.empty_like(weight, dtype=dtype, requires_grad=False)
            for weight in weights
            if weight.requires_grad
        }
        self._seen: dict[Tensor, tuple[Tensor, int]] = {}

    def __contains__(self, weight: Tensor) -> bool:
        return weight in self._copies

    def of(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The copies, to be written by an update of the weights that ends in `written`."""
        return [self._copies[weight] for weight in weights]

    @torch.no_grad()
    def refresh(self, anew: bool = False) -> None:
        """Bring the copies up to date, several in a launch; `anew`, all of them, whatever is known
        of changes."""
        stale = [weight for weight in self._copies if anew or self._changed(weight)]
        for weight in stale:
            if not _alike(weight, self._copies[weight]):
                self._copies[weight] = torch.empty_like(weight, dtype=self.dtype)
        if stale:
            torch._foreach_copy_(self.of(stale), stale)
        self.written(stale)

    def written(self, weights: Sequence[Tensor] | None = None) -> None:
        """The copies of these weights, or of all, are what the weights round to."""
        for weight in self._copies if weights is None else weights:
            # what shares the weight's memory keeps it: no other tensor can come to lie there
            self._seen[weight] = (weight.detach(), weight._version)

    def _changed(self, weight: Tensor) -> bool:
        if weight not in self._seen:
            return True
        memory, version = self._seen[weight]
        return weight._version != version or weight.data_ptr() != memory.data_ptr()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Networks that run inside take the copies instead of casting."""
        global _in_use
        before, _in_use = _in_use, self._copies
        try:
            yield
        finally:
            _in_use = before


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.device) == (b.shape, b.stride(), b.device)


def in_type(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in `dtype`, without a link to autograd: copies in use, the others cast."""
    given = [_copy_in_use(weight, dtype) for weight in weights]
    with torch.no_grad():
        tensors = [w if c is None else c for w, c in zip(weights, given, strict=True)]
        return trunk.cast(tensors, [dtype] * len(tensors))


def stand_in(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The copy in use of `weight` in `dtype`, whose gradient becomes that of the weight; without
    one the weight itself, for others to cast."""
    copy = _copy_in_use(weight, dtype)
    return weight if copy is None else _StandIn.apply(weight, copy)


def _copy_in_use(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    copy = _in_use.get(weight)
    return copy if copy is not None and copy.dtype == dtype else None


class _StandIn(torch.autograd.Function):
    """A cast that somebody has made already."""

    @staticmethod
    def forward(ctx, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.to(ctx.dtype), None
