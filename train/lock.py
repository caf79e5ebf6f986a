"""One process a run folder."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from train.errors import LockedError
from train.files import unwritable

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None

FILE = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. The lock is the system's, on a file that stays, and ends with
    the process however that ends.

    Raises LockedError while another process holds it, and DiskError.
    """
    try:
        number = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(folder / FILE, error) from error
    with open(number, "r+") as stream:
        _lock(folder, stream)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield


def _lock(folder: Path, stream) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = stream.read() or "another process"
        raise LockedError(
            f"{folder} is in use by {holder}: wait until it is done, or stop it"
        ) from error
    except OSError:  # a network disk without locks
        return
