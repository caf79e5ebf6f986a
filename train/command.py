"""How every command ends: with an exit code, and a sentence instead of a traceback."""

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import torch

from models import BackendUnavailable
from train.errors import (
    INTERRUPTED,
    READER_GONE,
    DiskError,
    LapisError,
    OutOfMemoryError,
    Stopped,
    UsageError,
)


def run_command(
    job: Callable[[], object],
    *,
    debug: bool = False,
    interrupted: str = "interrupted",
    no_memory: str = "use a smaller batch",
    silent: bool = False,
) -> int:
    """Run `job` and return its exit code: 0, that of the error, whose sentence goes to stderr, that
    of the signal which stopped a training, or READER_GONE where nobody reads the output any more.

    interrupted: what to say of Ctrl-C. no_memory: the cure where the GPU's memory is too small.
    With `debug` an error is raised instead. silent: another process does the same and speaks for
    this one, of all but what can only be this one's: its memory, and bugs.
    """
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook; file names need not fit a terminal
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with contextlib.redirect_stdout(_Output(sys.stdout)):
            with _silence() if silent else contextlib.nullcontext():
                job()
            sys.stdout.flush()
    except (LapisError, BackendUnavailable) as error:
        if debug:
            raise
        if not silent:
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
        if not silent:
            print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except _OutputLost as lost:
        if debug:
            raise
        reason = lost.__cause__
        with contextlib.suppress(OSError):  # what is left to write goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if reason.errno == errno.EPIPE:
            return READER_GONE
        said = f"the output cannot be written ({reason.strerror}): send it elsewhere"
        print(f"error: {said}", file=sys.stderr)
        return DiskError.exit_code
    return 0


class _OutputLost(Exception):
    """Standard output takes no more. No OSError: that would be laid at some file's door."""


class _Output:
    """Standard output that raises _OutputLost."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise _OutputLost from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise _OutputLost from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    redirect = contextlib.redirect_stdout, contextlib.redirect_stderr
    with open(os.devnull, "w") as nowhere, redirect[0](nowhere), redirect[1](nowhere):
        yield
