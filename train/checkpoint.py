"""Checkpoints: tensors and primitives only, replaced atomically, the one before last kept.

`last.pt` is the state after the last epoch, `previous.pt` the one before it, `best.pt` the best
validation accuracy. Each holds under `weights` the weights to use: the moving average where there
is one. `torch.load(..., weights_only=True)` always opens them.
"""

import io
import os
import pickle
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from train.errors import CheckpointError
from train.files import write_atomically

SCHEMA = 4


def save(folder: Path, state: dict[str, Any], best: bool) -> None:
    """Write `state` as last.pt of `folder`, moving the last one to previous.pt; best.pt too if
    `best`.

    Raises DiskError when the disk is full or the folder cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"schema": SCHEMA, **state}, buffer)
    last = folder / "last.pt"
    folder.mkdir(exist_ok=True)
    if last.exists():
        os.replace(last, folder / "previous.pt")
    write_atomically(last, buffer.getvalue())
    if best:
        write_atomically(folder / "best.pt", buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU.

    Raises CheckpointError when it is missing, damaged, of another schema, or holds anything but
    tensors and primitives.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: name a run folder that has checkpoints")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, BadZipFile) as error:
        reason = str(error).strip().split(".")[0]
        raise CheckpointError(f"{path} is damaged or no checkpoint ({reason})") from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is not a checkpoint of this version (schema {SCHEMA})")
    return state


def load_newest(folder: Path) -> tuple[dict[str, Any], Path]:
    """last.pt, or previous.pt when last.pt is missing or damaged; with the path taken.

    Raises CheckpointError when neither can be read.
    """
    problems = []
    for name in ("last.pt", "previous.pt"):
        try:
            return load(folder / name), folder / name
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError("nothing to resume from: " + "; ".join(problems))
