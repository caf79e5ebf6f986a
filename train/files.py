"""Files that are whole or not there: written beside their place, flushed to the disk, renamed."""

import contextlib
import os
import tempfile
from pathlib import Path

from train.errors import DiskError


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, never meets half a file.

    Raises `DiskError` naming `path` when the folder is missing, full or not writable.
    """
    path = Path(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 would hide a report from others
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> DiskError:
    """The sentence for a file or folder the disk refused."""
    reason = error.strerror or str(error)
    return DiskError(
        f"cannot write {path}: {reason}; free space there, or choose a writable folder with --out"
    )


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
