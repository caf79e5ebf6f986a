"""Who does which job: processes that share a folder, on one machine or several, claim a job first.

A claim is a file NAME.N that only one process can create. Whoever holds the highest number holds
the job. A claim that was given up, whose process is gone, or whose heartbeat has stopped is not
removed but outbid with N + 1, so that two processes never take over the same one.
"""

import contextlib
import json
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from train.errors import DiskError
from train.files import unwritable, write_atomically

BEAT = 10.0  # seconds between heartbeats
STALE = 120.0  # seconds without one after which a claim of another machine counts as abandoned


@dataclass(frozen=True)
class Claim:
    """A job that this process holds."""

    path: Path

    def beat(self) -> bool:
        """Show that the holder lives; False when another process has taken the job over."""
        with contextlib.suppress(OSError):  # a network folder may be away for a moment
            os.utime(self.path)
            return _claims(self.path.parent, self.path.stem)[-1] == self.path
        return True

    def release(self) -> None:
        """Give the job up, finished or not."""
        with contextlib.suppress(DiskError):  # it then counts as abandoned before long
            holder = _identity(os.getpid()) | {"released": True}
            write_atomically(self.path, json.dumps(holder).encode())


def claim(folder: Path, name: str) -> Claim | None:
    """Claim the job `name`; None while another process holds it. Raises DiskError."""
    standing = _claims(folder, name)
    if standing and not _abandoned(standing[-1]):
        return None
    number = int(standing[-1].suffix[1:]) + 1 if standing else 1
    path = folder / f"{name}.{number}"
    try:
        with open(path, "x") as stream:
            json.dump(_identity(os.getpid()), stream)
    except FileExistsError:
        return None
    except OSError as error:
        raise unwritable(path, error) from error
    return Claim(path)


def _claims(folder: Path, name: str) -> list[Path]:
    found = (path for path in folder.iterdir() if path.stem == name and path.suffix[1:].isdecimal())
    return sorted(found, key=lambda path: int(path.suffix[1:]))


def _abandoned(path: Path) -> bool:
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # about to be written, or never finished
        holder = None
    holder = holder if isinstance(holder, dict) else {}  # then its age decides
    if holder.get("released"):
        return True
    if holder.get("host") == _host() and holder.get("started") is not None:
        return holder != _identity(holder.get("pid"))
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent) as probe:  # the folder's own clock
            return os.stat(probe.name).st_mtime - path.stat().st_mtime > STALE
    except OSError as error:
        raise unwritable(path, error) from error


def _identity(pid: int) -> dict[str, object]:
    """A process for all machines and times: a pid alone is used again. `started` is None where the
    process is gone, or the system does not say."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = None
    return {"host": _host(), "pid": pid, "started": started}


def _host() -> str:
    """The machine, and on it the container, within which a pid names a process."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()
