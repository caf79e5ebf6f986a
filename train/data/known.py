"""What was once worked out from a file, remembered as long as the file stays as it is."""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from kernels.store import cache_dir
from train.errors import FOREIGN, DiskError
from train.files import write_atomically
from train.record import opened, sealed

# A file changed this short a time ago may change again without its time stamps showing it.
SETTLED_NS = 2 * 10**9


class Known:
    """A table of JSON values, one a file, kept in `folder` (default: the user's cache folder).

    name: what the table is about; another name is another table. A value holds for the size, the
    times of change and the inode its file had. A damaged table is an empty one, and one that
    cannot be written costs the work again next time.
    """

    def __init__(self, name: str, folder: Path | None = None):
        key = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()
        self._path = (folder or cache_dir()) / f"{key[:32]}.known.json"
        self._changed = False
        try:
            self._entries = dict(opened(json.loads(self._path.read_bytes()))["files"])
        except FOREIGN:
            self._entries = {}

    def get(self, file: str, status: os.stat_result) -> Any:
        """What is known about `file`, whose status is now `status`; None if nothing is."""
        entry = self._entries.get(file)
        known = isinstance(entry, list) and len(entry) == 2 and entry[0] == _identity(status)
        return entry[1] if known else None

    def put(self, file: str, status: os.stat_result, value: Any, *, own: bool = False) -> None:
        """Remember `value`, worked out after `status` was taken.

        own: the file was written by this process and nobody else changes it; any other is
        remembered only once its last change is some seconds ago.
        """
        age = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns)
        if own or age > SETTLED_NS:
            self._entries[file] = [_identity(status), value]
            self._changed = True

    def save(self) -> None:
        """Write the table, if anything was put into it."""
        if not self._changed:
            return
        with contextlib.suppress(DiskError, OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(sealed({"files": self._entries})).encode())


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
