"""Checkpoints: tensors and primitives only, replaced atomically, the one before last kept.

`last.pt` is the latest state, `previous.pt` the one saved before it, `best.pt` the best validation
accuracy. Each holds under `weights` the weights to use: the moving average where there is one. A
file ends with the SHA-256 of everything before; `torch.load(path, weights_only=True)` opens it all
the same, because a zip archive, which it is, may be followed by a comment.
"""

import hashlib
import io
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from train.errors import CheckpointError, DiskError
from train.files import remove_temporaries, write_atomically

SCHEMA = 7
MARK = b"\nsha256 "
SEAL = len(MARK) + 64  # bytes
RETRY = 1.0  # seconds until a disk that was full is tried again


def save(folder: Path, state: dict[str, Any], best: bool) -> None:
    """Write `state` as last.pt of `folder`, moving the last one to previous.pt; best.pt too, and
    first, if `best`. Whenever the process ends in here, last.pt or previous.pt is whole.

    Raises DiskError, with the bytes needed, when the disk is full or the folder cannot be written,
    also after a second try.
    """
    buffer = io.BytesIO()
    torch.save({"schema": SCHEMA, **state}, buffer)
    data = sealed(buffer.getvalue())
    try:
        _write(folder, data, best)
    except DiskError:
        time.sleep(RETRY)
        try:
            _write(folder, data, best)
        except DiskError as error:
            raise DiskError(f"{error} (a checkpoint needs {len(data):,} bytes)") from error


def _write(folder: Path, data: bytes, best: bool) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make {folder}: {error.strerror}; choose another --out") from error
    if best:  # before last.pt, whose history speaks of it
        write_atomically(folder / "best.pt", data)
    write_atomically(folder / "last.pt", data, keep=folder / "previous.pt")


def sealed(data: bytes) -> bytes:
    """`data` followed by its SHA-256."""
    return data + MARK + hashlib.sha256(data).hexdigest().encode()


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU.

    Raises CheckpointError when it is missing, damaged, of another schema, or holds anything but
    tensors and primitives.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: name a run folder that has checkpoints")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    data = content[:-SEAL]
    if content[-SEAL:][: len(MARK)] != MARK:
        raise CheckpointError(
            f"{path} is cut off, or no checkpoint of this version: it does not end with its SHA-256"
        )
    if sealed(data) != content:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is another than it says")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle made to harm may raise anything; none of it was run
        reason = str(error).strip().split(".")[0]
        raise CheckpointError(f"{path} is no checkpoint ({reason})") from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is not a checkpoint of this version (schema {SCHEMA})")
    return state


def is_sealed(path: Path) -> bool:
    """Whether a file ends as a checkpoint of ours does, damaged or not. Raises CheckpointError."""
    try:
        return path.read_bytes()[-SEAL:].startswith(MARK)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error


def load_newest(folder: Path) -> tuple[dict[str, Any], Path]:
    """last.pt, or previous.pt when last.pt is missing or, which is a warning, damaged; with the
    path taken.

    Raises CheckpointError when neither can be read.
    """
    problems = []
    for name in ("last.pt", "previous.pt"):
        try:
            state = load(folder / name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems and (folder / "last.pt").exists():
            warnings.warn(f"{problems[0]}; previous.pt takes its place", stacklevel=2)
        return state, folder / name
    raise CheckpointError("nothing to resume from: " + "; ".join(problems))


def tidy(folder: Path, used: Path) -> None:
    """Make `folder` ready to go on from `used`: without what killed writes left, and with a damaged
    last.pt out of the way, which would become the next previous.pt."""
    remove_temporaries(folder)
    last = folder / "last.pt"
    if used != last and last.exists():
        os.replace(last, folder / "damaged.pt")
