"""The machine a run meets: device, precision, threads, determinism, versions."""

import os
import platform
import subprocess
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision

from kernels import why_not_triton
from train import distributed
from train.config import RunConfig
from train.errors import UsageError


def choose_device(wanted: str) -> torch.device:
    """auto, cpu or cuda as a device. Raises UsageError, with the reason, when cuda is not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old driver warns here; the backend line names it
        available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UsageError(f"--device cuda: {why_not_triton() or 'no CUDA device'}; leave it out")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def choose_amp(wanted: str, device: torch.device) -> torch.dtype | None:
    """auto, bf16, fp16 or off as the autocast dtype, None for full precision.

    auto is bfloat16 where the hardware computes in it. Raises UsageError for fp16 without CUDA.
    """
    if wanted == "fp16" and device.type != "cuda":
        raise UsageError("--amp fp16 needs a CUDA device: use --amp bf16 or off")
    if wanted == "auto":
        wanted = "bf16" if _has_bf16(device) else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[wanted]


def set_threads(threads: int | None) -> None:
    """CPU threads of this process; None leaves one a core. Raises UsageError below 1."""
    if threads is not None:
        if threads < 1:
            raise UsageError(f"--threads must be at least 1, not {threads}")
        torch.set_num_threads(threads)


def prepare(config: RunConfig) -> None:
    """Threads and determinism of this process."""
    set_threads(config.threads)
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # it would write NaN into every new tensor, in every step
        torch.utils.deterministic.fill_uninitialized_memory = False


def default_workers(device: torch.device) -> int:
    """Threads for the loader: one beside a training on the CPU, more where a GPU waits for data."""
    cores = (os.cpu_count() or 2) // distributed.local_processes()
    return 1 if device.type == "cpu" else max(1, min(8, cores - 1))


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({_cpu_name()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on; `commit` where the code is a git checkout."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a subclass of str that weights_only refuses
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
    }
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return found
    return found | ({"commit": answer.stdout.strip()} if answer.returncode == 0 else {})


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
