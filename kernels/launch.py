"""Where Triton is usable, why not where it is not, and the one door every kernel is launched
through.

`run` is that door: inside `record(...)` it writes down what would be launched instead of launching
it, so ahead-of-time compilation and the counting of launches see exactly what a GPU would be given.
"""

import ctypes
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows: the rooms still import, their references still work
    triton = SimpleNamespace(jit=lambda fn: fn)
    tl = SimpleNamespace(constexpr=lambda value=None: value)
    TRITON_MISSING = True
else:
    TRITON_MISSING = False

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" and not TRITON_MISSING
OLDEST_CAPABILITY = (8, 0)  # cp.async and bf16 matrix instructions; older GPUs spill

if INTERPRET:
    # numpy 2.4 makes no Python number of a one-element array, which the 3.6 interpreter asks for
    # in every `range` over a tensor
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_and_index


@dataclass(frozen=True)
class Launch:
    """One kernel launch as it was asked for: the grid, positional arguments and named options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass
class Recording:
    """The launches of a `record` block, and the device they were planned for."""

    capability: tuple[int, int]
    multiprocessors: int
    launches: list[Launch] = field(default_factory=list)


_recording: Recording | None = None


@contextmanager
def record(capability: tuple[int, int] = (9, 0), multiprocessors: int = 132) -> Iterator[Recording]:
    """Record launches instead of making them; launchers then accept tensors on the meta device."""
    global _recording
    before, _recording = _recording, Recording(capability, multiprocessors)
    try:
        yield _recording
    finally:
        _recording = before


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch `kernel` over `grid` on the device of the first tensor argument."""
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, args, options))
        return
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, torch.Tensor))):
        kernel[grid](*args, **options)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of the CUDA `device`, of the recording, or (8, 0) for the interpreter."""
    if _recording is not None:
        return _recording.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else OLDEST_CAPABILITY


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of `device`; 4 for the interpreter, where each program costs
    time."""
    if _recording is not None:
        return _recording.multiprocessors
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache  # asked at every call of an op
def why_not_triton(device: torch.device | None = None) -> str | None:
    """The reason why the kernels cannot run on `device` (default: the current GPU), or None if
    they can."""
    if TRITON_MISSING:
        return "triton is not installed"
    if INTERPRET:
        return None
    if not torch.cuda.is_available():
        return _why_no_cuda()
    if device is not None and device.type != "cuda":
        return f"the model is on {device.type}, the kernels need CUDA"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} is sm_{found[0]}{found[1]}, the kernels need sm_80 or newer"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler (gcc or clang), which Triton needs to build its launchers"
    return None


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    driver = _driver_supports()
    needed = int(torch.version.cuda.split(".")[0])
    if 0 < driver // 1000 < needed:
        return (
            f"the GPU driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, "
            f"too old for this torch (CUDA {torch.version.cuda})"
        )
    return "no CUDA device"


def _driver_supports() -> int:
    """The newest CUDA the GPU driver runs, as 13000 for 13.0; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether an op called with `tensor` launches kernels: on CUDA, or anywhere when Triton
    interprets."""
    return INTERPRET or (tensor.is_cuda and why_not_triton(tensor.device) is None)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, made for kernels too, costs microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def nhwc(x: torch.Tensor) -> torch.Tensor:
    """`x` [N, C, H, W] dense in channels-last order; copied only if it is not (NCHW, expanded,
    sliced)."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_nhwc(
    n: int, c: int, h: int, w: int, like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Uninitialised [n, c, h, w] tensor in channels-last order on the device of `like`."""
    return torch.empty(
        (n, c, h, w),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def check(condition: bool, message: Callable[[], str]) -> None:
    """Raise ValueError with a lazily built message unless `condition` holds."""
    if not condition:
        raise ValueError(message())


def describe(x: torch.Tensor) -> str:
    """Shape, dtype and device, as they stand in error messages."""
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def check_image(name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless x is [N, C, H, W] of a type that the kernels take."""
    check(x.dim() == 4, lambda: f"{name} must be [N, C, H, W], not {tuple(x.shape)}")
    check(
        x.dtype in (torch.float32, torch.bfloat16, torch.float16),
        lambda: f"{name} must be float32, bfloat16 or float16, not {x.dtype}",
    )
