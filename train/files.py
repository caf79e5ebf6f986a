"""Files that are whole or not there: written beside their place, flushed to the disk, renamed."""

import contextlib
import os
import re
import secrets
from pathlib import Path

from train import faults
from train.errors import DiskError

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")


def write_atomically(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Write `data` to `path` so that a reader, or a crash, never meets half a file.

    keep: where the file that stood at `path` goes, once the new one is on the disk.
    Raises `DiskError` naming `path` when the folder is missing, full or not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as stream:
            faults.point(path.name, "opened")
            stream.write(data)
            faults.point(path.name, "written")
            stream.flush()
            os.fsync(stream.fileno())
        faults.point(path.name, "synced")
        if keep is not None and path.exists():
            os.replace(path, keep)
            faults.point(path.name, "moved")
        os.replace(temporary, path)
        faults.point(path.name, "replaced")
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise unwritable(path, error) from error


def _sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk too, where a folder can be opened."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks cannot, the file itself is safe
            os.fsync(number)
    finally:
        os.close(number)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writes have left in `folder`, in which nobody else may be writing."""
    for path in folder.glob(".*"):
        if _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def unwritable(path: Path, error: OSError) -> DiskError:
    """The sentence for a file or folder the disk refused."""
    reason = error.strerror or str(error)
    return DiskError(
        f"cannot write {path}: {reason}; free space there, or choose a writable folder with --out"
    )
