"""Files that are whole or not there: written beside their place, flushed to the disk, renamed."""

import contextlib
import os
import secrets
from pathlib import Path

from train.errors import DiskError


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, never meets half a file.

    Raises `DiskError` naming `path` when the folder is missing, full or not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> DiskError:
    """The sentence for a file or folder the disk refused."""
    reason = error.strerror or str(error)
    return DiskError(
        f"cannot write {path}: {reason}; free space there, or choose a writable folder with --out"
    )
