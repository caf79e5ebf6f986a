"""Memory and energy, where the system tells them: resident pages from Linux, joules from NVML."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")
RESET_PEAK = "5"  # proc(5), /proc/pid/clear_refs
LEAST_SECONDS = 2.0  # the counter of the joules moves about every 0.1 s


def resident_above(step: Callable[[], object]) -> int | None:
    """Bytes by which the peak of resident memory during `step()` passes what was resident before
    it; None where the system does not tell. Freed memory is handed back first, so it counts again.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text(RESET_PEAK)
        before = _status("VmRSS")
        step()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def _status(name: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) * 1024


def joules_of(step: Callable[[], object], device: torch.device) -> float | None:
    """Joules the whole card draws during one `step()`, the mean over at least two seconds; None on
    a CPU and where NVML does not count."""
    if device.type != "cuda" or (read := _energy_counter(device)) is None:
        return None
    torch.cuda.synchronize(device)
    steps, begin, start = 0, read(), time.perf_counter()
    while time.perf_counter() - start < LEAST_SECONDS:
        for _ in range(8):
            step()
        steps += 8
        torch.cuda.synchronize(device)
    return (read() - begin) / steps


def _energy_counter(device: torch.device) -> Callable[[], float] | None:
    """A function that reads the card's counter in joules (NVML, from Volta on), or None."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        handle, counted = ctypes.c_void_p(), ctypes.c_ulonglong()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
            return None

        def read() -> float:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(counted))
            return counted.value / 1e3

        failed = nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(counted))
    except (OSError, AttributeError):
        return None
    return None if failed else read
