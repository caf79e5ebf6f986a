"""Short training runs in forks of a process that has the libraries loaded, and what they end with.

A process whose threads have computed must not fork: whoever starts runs here computes nothing, or
on one thread.
"""

import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from train import checkpoint, faults, run
from train.doctor.signals import Signals
from train.record import read_jsonl

FLAGS = [
    *("--data", "synthetic", "--limit", "60", "--model", "micro_resnet", "--image-size", "32"),
    *("--epochs", "3", "--batch-size", "8", "--threads", "1", "--dropout", "0.2"),
]
RICH = ["--steps-per-checkpoint", "3", "--mixup", "0.2", "--ema", "0.9", "--workers", "2"]
PLAIN = ["--steps-per-checkpoint", "2", "--ema", "0", "--workers", "0"]


def start(folder: Path, *words: object, fault: str = "") -> int:
    """Start a run in a fork; its process id. What it says is beside `folder`, ending in .said and
    .errors."""
    child = os.fork()
    if child:
        return child
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name, number in (("said", 1), ("errors", 2)):
            stream = os.open(
                folder.with_suffix(f".{name}"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644
            )
            os.dup2(stream, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        faults._file, faults._stage, count, faults._action = (fault.split(":") + [""] * 4)[:4]
        faults._wanted, faults._left = f"{faults._file}:{faults._stage}", int(count or 1)
        os._exit(run.main([str(word) for word in words]))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)


def end(child: int) -> int:
    """The exit code of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fresh(folder: Path, *flags: object, fault: str = "") -> int:
    return start(folder, *FLAGS, "--out", folder, *flags, fault=fault)


def go_on(folder: Path, flags: list[str]) -> int:
    """Start what is left of a run; one that was killed before it was a run starts again."""
    if (folder / "config.json").exists():
        return start(folder, "--resume", folder)
    return fresh(folder, *flags)


def resume(folder: Path) -> int:
    return end(start(folder, "--resume", folder))


def errors(folder: Path) -> str:
    return folder.with_suffix(".errors").read_text()


def wait_for(condition, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.002)


TIMES = ("seconds", "images_per_second")


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def differences(one, other, path: str = "") -> list[str]:
    """Where two states are not the same bit for bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        return [d for key in one for d in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other), path
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    return [] if one == other else [path]


def final(folder: Path) -> dict:
    """Everything a run ends with, but for its times and where it lies."""
    found = {}
    for name in ("last", "best"):
        found[name] = without_times(checkpoint.load(folder / "checkpoints" / f"{name}.pt"))
        found[name].pop("versions")  # with the commit
        for place in ("out", "resume"):
            found[name]["config"]["run"].pop(place)
    found["metrics"] = without_times(read_jsonl(folder / "metrics.jsonl"))
    signals = Signals(read_jsonl(folder / "signals.jsonl"))
    found["signals"] = [signals.per_step(name).tolist() for name in ("loss", "learning_rate")]
    found["epochs"] = [record["epoch"] for record in signals.epochs]
    assert not list(folder.rglob(".*.????????"))
    assert (folder / "report.html").exists()
    return found
