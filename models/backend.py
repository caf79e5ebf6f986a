"""Which path a device can take: eager PyTorch, torch.compile or the Triton kernels, and why."""

from dataclasses import dataclass

import torch

import kernels
from models import compiled

BACKENDS = ("eager", "auto", "compile", "triton")

# What compiling costs and brings on a CPU: seconds to compile (10 to 22 with a warm cache, 34 to 42
# with a cold one) and seconds saved per 224x224 training image. The saving is an upper estimate:
# on 2 Zen 4 cores compiled steps took 0.94x to 1.01x of eager's speed (docs/notes.md).
COMPILE_SECONDS = 30.0
SAVED_SECONDS_PER_IMAGE = 0.001

# Measuring the plans of ResNet-34 compiles some 200 kernels, at about a second each, and a better
# plan may save 10 us an image: an estimate, from ahead-of-time compilation and the floors.
MEASURE_FROM_IMAGES = 20e6


class BackendUnavailable(Exception):
    """A backend was demanded by name and cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class Backend:
    """The path taken: `name` is eager, compile or triton; `reason` says in words why; `plan` is how
    triton's blocks find their plans, see `units.set_backend`."""

    name: str
    reason: str
    plan: str = "known"


def resolve_backend(
    requested: str, device: torch.device, training_images: float | None = None
) -> Backend:
    """Turn eager / auto / compile / triton into the path that will be taken on `device`.

    training_images: images still to be trained on, counted in units of 224x224 pixels; it decides
        whether compiling pays on a CPU, and on a GPU measuring the plans. None means many on a CPU,
        few on a GPU.

    Raises BackendUnavailable when compile or triton is demanded and cannot run.
    """
    if requested == "eager":
        return Backend("eager", "as asked: plain PyTorch")
    no_kernels = kernels.why_not_triton(device)
    if requested == "triton":
        if no_kernels:
            raise BackendUnavailable(
                f"--backend triton cannot run here: {no_kernels}; "
                "use --fused, which falls back to torch.compile or eager"
            )
        return Backend("triton", "as asked: fused Triton kernels", _plan(training_images))
    no_compiler = compiled.why_not_compile()
    if requested == "compile":
        if no_compiler:
            raise BackendUnavailable(
                f"--backend compile cannot run here: {no_compiler}; use --backend eager"
            )
        return Backend("compile", "as asked: torch.compile")
    if not no_kernels and device.type == "cuda":
        reason = f"fused Triton kernels on {torch.cuda.get_device_name(device)}"
        return Backend("triton", reason, _plan(training_images))
    no_kernels = no_kernels or "no CUDA device"
    if no_compiler:
        return Backend("eager", f"{no_kernels} and {no_compiler}: eager instead of the kernels")
    if device.type == "cpu" and training_images is not None:
        saved = SAVED_SECONDS_PER_IMAGE * training_images
        if saved < COMPILE_SECONDS:
            return Backend(
                "eager",
                f"{no_kernels}, and compiling (about {COMPILE_SECONDS:.0f} s) would save only "
                f"about {saved:.0f} s in this run: eager instead of the Triton kernels",
            )
    return Backend("compile", f"{no_kernels}: torch.compile instead of the Triton kernels")


def _plan(training_images: float | None) -> str:
    return "measure" if training_images and training_images >= MEASURE_FROM_IMAGES else "known"
