"""Named ranges on a profiler's timeline: epoch, step, data, forward, backward, optimizer, layers.

They cost next to nothing until a profiler switches them on. `models` and `train` import this file
and nothing else of `profiling`, so it imports nothing of ours.

The ranges stand in NVTX's domain `lapis`, through the package `nvtx` or, where that is missing,
`torch.cuda.nvtx`, which knows no domains. A step that is replayed from a CUDA graph runs no Python:
then there is the range of the whole step, and none inside it.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

try:
    import nvtx
except ImportError:  # the package exists for Linux alone
    nvtx = None

DOMAIN = "lapis"
DETAIL = " | "  # between the name of a range and its shape

Payload = int | Sequence[int | str] | None
Opener = Callable[[str, Payload], AbstractContextManager]

_NOTHING = nullcontext()
_opener: Opener | None = None
_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def range(name: str, payload: Payload = None) -> AbstractContextManager:
    """A range called `name` around what the `with` statement encloses, on this thread.

    payload: a number, or a shape that may end in words, which is written behind the name because
    NVTX's own payload is a number.
    """
    return _NOTHING if _opener is None else _opener(name, payload)


def through(
    layer: Callable[[Tensor], Tensor], name: str, x: Tensor, last: Tensor | None = None
) -> Tensor:
    """layer(x), in a range called `name`, and so its backward.

    The backward begins when the gradient of the output arrives and ends when that of x is known,
    or that of the weight `last` where x needs none. Hooks of tensors, not of modules, so that
    nothing in the layer takes another path for being watched.
    """
    if _opener is None:
        return layer(x)
    with range(name, x.shape):
        y = layer(x)
    end = x if x.requires_grad else last
    if y.requires_grad and end is not None and end.requires_grad:
        shape = x.shape
        y.register_hook(lambda _: _begin(name, shape))
        handle = end.register_hook(lambda _: _end(name, handle if end.is_leaf else None))
    return y


# name and range of the layer whose backward is open on a thread: where two layers meet, the end of
# the one and the beginning of the other are hooks of one tensor, which run in the wrong order
_layers = threading.local()


def _begin(name: str, shape: torch.Size) -> None:
    _end(getattr(_layers, "name", None))
    _layers.name, _layers.range = name, range(name, shape)
    _layers.range.__enter__()


def _end(name: str | None, handle: RemovableHandle | None = None) -> None:
    """End that layer if it is still open; remove the hook from a tensor that outlives the step."""
    if handle is not None:
        handle.remove()
    if name is not None and getattr(_layers, "name", None) == name:
        _layers.name = None
        _layers.range.__exit__(None, None, None)


def name_of(module: nn.Module) -> str:
    """The module's name in the model whose ranges are on, or that of its class; empty when off."""
    return "" if _opener is None else _names.get(module) or type(module).__name__


def switch_on(model: nn.Module | None = None, opener: Opener | None = None) -> None:
    """Open ranges from now on, those of blocks under their names in `model`.

    opener: what opens one, for another profiler than NVTX's.
    """
    global _opener
    _opener = opener or (nvtx_range if nvtx is not None else cuda_range)
    _names.clear()
    if model is not None:
        _names.update({module: name for name, module in model.named_modules()})


def switch_off() -> None:
    """Open no more ranges; those that are open end as they would."""
    global _opener
    _opener = None
    _names.clear()


def text_of(name: str, payload: Payload) -> str:
    """The text of a range: its name, and its shape if that is its payload."""
    if payload is None or isinstance(payload, int):
        return name
    sizes = "x".join(str(size) for size in payload if isinstance(size, int))
    words = [word for word in payload if isinstance(word, str)]
    return name + DETAIL + " ".join([sizes, *words])


def nvtx_range(name: str, payload: Payload) -> AbstractContextManager:
    """A range of the package `nvtx`."""
    number = payload if isinstance(payload, int) else None
    return nvtx.annotate(text_of(name, payload), domain=DOMAIN, payload=number)


def cuda_range(name: str, payload: Payload) -> AbstractContextManager:
    """A range of `torch.cuda.nvtx`, which takes no payload; it needs no GPU."""
    return torch.cuda.nvtx.range(text_of(name, payload))


def profiler_range(name: str, payload: Payload) -> AbstractContextManager:
    """A range of `torch.profiler`."""
    return torch.profiler.record_function(f"{DOMAIN}:{text_of(name, payload)}")
