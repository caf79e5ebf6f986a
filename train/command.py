"""How every command ends: with an exit code, and a sentence instead of a traceback."""

import sys
import warnings
from collections.abc import Callable

import torch

from models import BackendUnavailable
from train.errors import INTERRUPTED, LapisError, OutOfMemoryError, Stopped, UsageError


def run_command(
    job: Callable[[], object],
    *,
    debug: bool = False,
    interrupted: str = "interrupted",
    no_memory: str = "use a smaller batch",
) -> int:
    """Run `job` and return its exit code: 0, that of the error, whose sentence goes to stderr, or
    that of the signal which stopped a training.

    interrupted: what to say of Ctrl-C. no_memory: the cure where the GPU's memory is too small.
    With `debug` an error is raised instead.
    """
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not fit the terminal
    try:
        job()
    except (LapisError, BackendUnavailable) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", UsageError.exit_code)
    except torch.OutOfMemoryError:
        if debug:
            raise
        print(f"error: the GPU has too little memory for this batch: {no_memory}", file=sys.stderr)
        return OutOfMemoryError.exit_code
    except Stopped as stopped:
        return stopped.exit_code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    return 0
