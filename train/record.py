"""What a run writes while it runs: its folder and its JSON files (accuracies are 0..1).

A JSON object ends with `crc32`, a checksum of its other members, and so does each of a file of JSON
lines: a digit that a disk turned into another would be read without a word. Reading takes it off
again; objects without one, of other programs, are taken as they are.
"""

import datetime
import json
import math
import shlex
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import CheckpointError, DiskError, UsageError
from train.files import unwritable, write_atomically
from train.lock import locked


def create_run_folder(out: Path | None, model: str) -> Path:
    """Make the folder of a new run: `out`, or `runs/<date>-<model>-NNN` under the working folder.

    Two runs started at once get two folders. Raises `UsageError` when `out` holds a run already,
    `LockedError` when that is under way, and `DiskError` when the folder cannot be made or written
    to.
    """
    try:
        if out is None:
            return _next_run(Path("runs"), f"{datetime.date.today().isoformat()}-{model}-")
        out = Path(out)
        if out.exists() and not out.is_dir():
            raise DiskError(f"--out {out} is a file; choose a folder, or remove the file")
        if (out / "config.json").exists():
            with locked(out):  # by another process, that is another error
                pass
            raise UsageError(
                f"--out {out} holds a run already; continue it with"
                f" --resume {shlex.quote(str(out))} or choose another folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # the one sure test, also for root and full disks
            return out
    except OSError as error:
        raise unwritable(out or Path("runs"), error) from error


def _next_run(parent: Path, prefix: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    taken = [path.name.removeprefix(prefix) for path in parent.glob(f"{prefix}*")]
    number = max((int(tail) for tail in taken if tail.isdecimal()), default=0)
    while True:
        number += 1
        folder = parent / f"{prefix}{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:  # another run took the number meanwhile
            continue
        return folder


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all.

    Paths become strings, numpy scalars numbers, and numbers JSON has no word for (NaN, infinity)
    null. Raises `DiskError`.
    """
    text = json.dumps(sealed(plain(value)), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """What a JSON file of ours holds. Raises `CheckpointError` when it is missing or damaged."""
    try:
        return opened(json.loads(Path(path).read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is missing or damaged: restore or remove it") from error


def write_jsonl(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Write `records` as JSON lines, whole or not at all. Raises `DiskError`."""
    write_atomically(path, b"".join(map(json_line, records)))


def json_line(record: Mapping[str, object]) -> bytes:
    """A line of the files that `read_jsonl` reads."""
    text = json.dumps(sealed(plain(record)), ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def read_jsonl(path: Path) -> list[dict]:
    """The records of a JSON-lines file; a missing file has none, a torn last line is dropped.

    Raises `CheckpointError` naming the line when one before the last is damaged.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    records = [_parse(line) for line in lines]
    if records and records[-1] is None:
        records.pop()
    for number, record in enumerate(records, start=1):
        if record is None:
            raise CheckpointError(f"{path} is damaged at line {number}; remove that line to go on")
    return records


def _parse(line: bytes) -> dict | None:
    try:
        record = opened(json.loads(line))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def sealed(value: Any) -> Any:
    """A JSON value that can be written; an object with its checksum."""
    value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value | {"crc32": _crc32(value)} if isinstance(value, dict) else value


def opened(value: Any) -> Any:
    """The value `sealed` was given. Raises ValueError when it is another."""
    if isinstance(value, dict) and "crc32" in value:
        crc32 = value.pop("crc32")
        if crc32 != _crc32(value):
            raise ValueError("its checksum does not fit")
    return value


def _crc32(members: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(members).encode()):08x}"


def plain(value: object) -> object:
    """`value` as JSON gives it back: paths strings, numbers that are not finite None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
