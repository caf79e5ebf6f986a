"""One run of a study, in a process of its own: train or resume, then measure.

`train.study` starts it as `python -m train.study.child PARENT RUN_DIR FLAGS...`, with the flags of
`train.run`; it ends when that process ends, so that no forgotten run writes into the folder.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from models.compiled import tune_allocator
from train import run
from train.command import run_command
from train.study.measure import measure

PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str]) -> int:
    """Do what is left of the run; returns the exit code."""
    parent, folder, *flags = argv
    _end_with(int(parent))
    folder, memory = Path(folder), None
    if not (folder / "summary.json").is_file():
        tune_allocator()  # changes no number
        code = run.main(flags)
        if code:
            return code
        memory = _peak_memory()
    return run_command(lambda: measure(folder, memory))


def _end_with(parent: int) -> None:
    """Let the kernel end this process with the one that started it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended already
        sys.exit(1)


def _peak_memory() -> int | None:
    """Bytes: the most this process held, of the GPU's memory where there is one; None where the
    system does not tell."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on macOS bytes
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
