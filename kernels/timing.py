"""Honest timing: cold caches, many samples, providers taking turns, and an interval for each ratio.

A *sampler* is a function that returns one sample: microseconds a call, averaged over one pass
through a list of calls. Each call works on its own input set; `rotations` says how many sets make
their bytes pass three times the L2, so no call finds its inputs cached by the one before.
"""

import functools
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import torch

Call = Callable[[], object]
SAMPLE_US = 1000.0  # a sample lasts at least this long, so that starting it is no part of it
MOST_SETS = 256
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median and quartiles of `n` samples, and how they were taken."""

    median_us: float
    low_us: float
    high_us: float
    method: str
    n: int
    samples: tuple[float, ...] = field(repr=False, default=())


@dataclass(frozen=True)
class Sampler:
    """`sample()` gives microseconds a call; `method` says how it is taken."""

    sample: Callable[[], float]
    method: str


def place(device: torch.device) -> dict[str, str]:
    """Where and with what something is measured: device, torch, triton, cudnn, driver."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "torch": str(torch.__version__),
        "triton": triton_version,
        "cudnn": str(torch.backends.cudnn.version()) if cuda else "none",
        "driver": _driver() if cuda else "none",
    }


@functools.cache
def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(done.stdout.split()), "unknown")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'} x{os.cpu_count()}"


def summarise(samples: Sequence[float], method: str) -> Timing:
    """Median and quartiles of at least one sample."""
    low, _, high = (
        quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    )
    return Timing(median(samples), low, high, method, len(samples), tuple(samples))


def rotations(bytes_per_call: float, device: torch.device) -> int:
    """How many input sets pass three times the L2 of `device`, at most 256; 2 on a CPU."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return int(min(MOST_SETS, max(2, 3 * cache // max(1.0, bytes_per_call) + 1)))


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Everything that is measured runs on one stream that is not the default one: a backward pass
    runs on its forward's stream, and the default stream cannot be captured."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of `calls`, in order, on the current side stream.

    The calls must have run before (cuDNN's search, Triton's compilation and lazy buffers are not
    capturable). Raises RuntimeError when something in them cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for call in calls:
            call()
    return graph


def graph_sampler(calls: Sequence[Call], device: torch.device) -> Sampler:
    """Samples by replaying a CUDA graph of all `calls`; by events where capture fails; by the
    processor's clock on a CPU."""
    if device.type != "cuda":
        return loop_sampler(calls, device)
    for call in calls:
        call()
    try:
        return replay_sampler(calls, device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:60]
        events = loop_sampler(calls, device)
        return Sampler(events.sample, f"events, capture failed: {reason}")


def replay_sampler(calls: Sequence[Call], device: torch.device) -> Sampler:
    """Samples by replaying a CUDA graph of all `calls`, which must have run before. Raises
    RuntimeError when something in them cannot be captured."""
    try:
        graph = capture(calls)
    except RuntimeError:
        torch.cuda.synchronize()
        raise
    replayed = loop_sampler([graph.replay], device)
    return Sampler(lambda: replayed.sample() / len(calls), "cuda graph")


def loop_sampler(
    calls: Sequence[Call], device: torch.device, at_least_us: float = SAMPLE_US
) -> Sampler:
    """Samples by making the calls one after another, launches included, for `at_least_us`; with 0
    once."""
    clock = _event_clock if device.type == "cuda" else _processor_clock
    for call in calls:
        call()
    passes = int(at_least_us / max(clock(calls), 1e-3)) + 1 if at_least_us else 1
    work = list(calls) * passes
    method = "events" if device.type == "cuda" else "perf_counter"
    return Sampler(lambda: clock(work) / len(work), method)


def _event_clock(calls: Sequence[Call]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _processor_clock(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) * 1e6


def measure(
    samplers: dict[str, Sampler], rounds: int = 21, seconds: float = float("inf")
) -> dict[str, Timing]:
    """One sample of each sampler in turn, `rounds` times, so that a change of clocks or of load
    meets all alike. A first round is thrown away. Past `seconds` it stops, though not before 5
    rounds."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    until = time.perf_counter() + seconds
    for index in range(rounds + 1):
        for name, sampler in samplers.items():
            value = sampler.sample()
            if index:
                samples[name].append(value)
        if index >= min(FEWEST_ROUNDS, rounds) and time.perf_counter() > until:
            break
    return {name: summarise(samples[name], samplers[name].method) for name in samplers}


def speedup(
    baseline: Timing, other: Timing, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """How many times faster `other` is than `baseline`, with the 95 % interval: the median of the
    round-by-round ratios, bootstrapped over rounds (both from one `measure`).

    Raises ValueError when the two were not sampled in the same rounds.
    """
    if len(baseline.samples) != len(other.samples) or not baseline.samples:
        raise ValueError("a paired ratio needs two timings of one measure(...)")
    slow, fast = (torch.tensor(t.samples, dtype=torch.float64) for t in (baseline, other))
    ratios = slow / fast
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(ratios), (draws, len(ratios)), generator=generator)
    low, high = ratios[picks].quantile(0.5, dim=1).quantile(ratios.new_tensor([0.025, 0.975]))
    return float(ratios.quantile(0.5)), float(low), float(high)
