"""`shards:PATTERN`: photos in tar files, as WebDataset and others write them.

    shards:DIR                          every .tar in a folder
    shards:DIR/train-*.tar              those a pattern fits
    shards:DIR/train-{000..063}.tar     exactly these; one that is missing is an error
    shards:PATTERN@2/8                  the second of eight machines' share: shard 2, 10, 18, ...

A sample is the members of one shard that share the name before their first dot: a photo and its
label, `.cls` (text) or `.json` (its "label"), else the folder the photo is in. A file classes.txt
beside the shards, a name a line, turns numbers into names and is then the same list of classes for
every machine. Shards are read in place, one after another, never unpacked; only what the cache
keeps of them needs room on this machine. A shard is read through once and then remembered.
"""

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from train.data.known import Known
from train.data.photos import EXTENSIONS, Excluded, Photos, choose_classes, decode
from train.errors import DataError, UsageError

PREFIX = "shards:"
CLASSES = "classes.txt"
MAX_BYTES = 2**28  # of one photo, which is read into memory
_LABELS = ("cls", "json")


def accepts(data: str) -> bool:
    return data.startswith(PREFIX)


def open_source(data: str, *, classes: tuple[str, ...] = (), seed: int = 0) -> Photos:
    """Raises DataError, with shard and sample, for shards that cannot be trusted."""
    shards = find_shards(data.removeprefix(PREFIX))
    folder = Path(os.path.commonpath([shard.parent for shard in shards]))
    names = _class_names(folder / CLASSES)
    files, labels, digests, excluded, members = [], [], [], [], {}
    for shard, index in zip(shards, _indices(shards), strict=True):
        place = shard.relative_to(folder).with_suffix("").as_posix()
        excluded += [Excluded(f"{place}/{name}", why, bad) for name, why, bad in index["left out"]]
        for name, label, offset, size, digest in index["photos"]:
            file = f"{place}/{name}"
            files.append(file)
            labels.append(_named(label, names, f"{name} in {shard}"))
            digests.append(digest)
            members[file] = (shard, offset, size)
    if not files:
        raise DataError(f"{data} holds no photo with a label: check the shards.")
    chosen = choose_classes(names or labels, classes, data)
    position = {label: i for i, label in enumerate(chosen)}
    photos = Photos(
        name=folder.name,
        classes=tuple(chosen),
        files=tuple(files),
        labels=np.array([position.get(label, -1) for label in labels], dtype=np.int64),
        digests=tuple(digests),
        excluded=tuple(excluded),
        load=ShardReader(members),
        bad_share=(bad := sum(item.bad for item in excluded)) / (bad + len(files)),
    )
    return photos.subset(np.flatnonzero(photos.labels >= 0))


@dataclass(frozen=True, repr=False)
class ShardReader:
    """Loads photos out of shards; members: file -> (shard, first byte, bytes)."""

    members: Mapping[str, tuple[Path, int, int]]

    def __call__(self, file: str, shorter: int | None = None) -> Image.Image:
        return decode(self.read(file), shorter)

    def read(self, file: str) -> bytes:
        """The photo file as it is stored. Raises DataError where the shard cannot be read."""
        shard, offset, size = self.members[file]
        try:
            with shard.open("rb") as stream:
                stream.seek(offset)
                content = stream.read(size)
        except OSError as error:
            raise DataError(f"{shard} cannot be read ({error.strerror}): try again.") from error
        if len(content) < size:
            raise DataError(f"{shard} became shorter while it was used: start again.")
        return content


def find_shards(pattern: str) -> list[Path]:
    """The shards that `pattern` names, sorted. Raises DataError if one or all are missing."""
    share = re.search(r"@(\d+)/(\d+)$", pattern)
    if share:
        pattern = pattern[: share.start()]
    if re.match(r"\w+:(//|.*\|)|pipe:", pattern):
        raise DataError(f"{PREFIX}{pattern} is no path: mount or copy the shards first.")
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "*.tar")
    paths = []
    for one in _expand(pattern):
        found = glob.glob(one)
        if not found:
            raise DataError(f"no shard {one} is there: check the path or get the missing shards.")
        paths += found
    shards = [Path(path) for path in sorted(set(paths))]
    if not share:
        return shards
    number, of = map(int, share.groups())
    if not 1 <= number <= of <= len(shards):
        raise UsageError(
            f"--data {PREFIX}{pattern}{share[0]}: the share must be K/N with "
            f"1 <= K <= N and N at most the {len(shards)} shards."
        )
    return shards[number - 1 :: of]


def _expand(pattern: str) -> list[str]:
    """Every name of a pattern with ranges like {000..063}."""
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not span:
        return [pattern]
    first, last = span.groups()
    numbers = (f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1))
    ends = _expand(pattern[span.end() :])
    return [pattern[: span.start()] + number + end for number in numbers for end in ends]


def _class_names(table: Path) -> list[str]:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{table} cannot be read: save it as UTF-8, a class name a line.") from None
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(set(names)) < len(names):
        raise DataError(f"{table} names a class twice: keep one line of each.")
    return names


def _named(label: str, names: Sequence[str], where: str) -> str:
    if not names or label in names:
        return label
    if re.fullmatch(r"[0-9]{1,9}", label) and int(label) < len(names):
        return names[int(label)]
    raise DataError(f"{where} has the label {label!r}, which {CLASSES} does not name: add it.")


def _indices(shards: Sequence[Path]) -> list[dict[str, Any]]:
    """What each shard holds, read in parallel, or remembered."""
    known = Known("shards 1")  # a change of what an index holds makes a new number

    def index(shard: Path) -> dict[str, Any]:
        try:
            status = shard.stat()
            found = known.get(os.path.realpath(shard), status)
            if found is None:
                found = read_index(shard)
                known.put(os.path.realpath(shard), status, found)
            return found
        except OSError as error:
            raise DataError(f"{shard} cannot be read ({error.strerror}).") from error

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        try:
            jobs = pool.map(index, shards)
            return list(tqdm(jobs, "reading shards", len(shards), unit=" shards", delay=1))
        finally:
            pool.shutdown(cancel_futures=True)
            known.save()


def read_index(shard: Path) -> dict[str, Any]:
    """What one shard holds: "photos", lists [name, label, first byte, bytes, SHA-256], and "left
    out", lists [name, reason, bad]. Raises DataError for a shard that is cut off or damaged, and
    for two members that claim to be the same."""
    samples: dict[str, dict[str, Any]] = {}
    left_out: list[list[Any]] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep them all
                if not member.isdir():
                    _add(tar, member, samples, left_out, shard)
            tar.fileobj.seek(tar.offset)
            ended = tar.fileobj.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
    except tarfile.TarError as error:
        raise DataError(
            f"{shard} is not a whole, uncompressed tar file ({error}): get or write it again."
        ) from None
    if not ended:  # tarfile takes a damaged header for the end, and a missing end for one
        raise DataError(f"{shard} is cut off or damaged: get or write it again.")
    photos = []
    for key, sample in samples.items():
        folder = PurePosixPath(key).parent.name
        if "photo" not in sample:
            left_out.append([key, "a label without a photo", True])
        elif label := sample.get("cls") or sample.get("json") or folder:
            photos.append([sample["photo"][0], label, *sample["photo"][1:]])
        else:
            left_out.append([sample["photo"][0], "has no label", True])
    return {"photos": photos, "left out": left_out}


def _add(tar: tarfile.TarFile, member: tarfile.TarInfo, samples, left_out, shard: Path) -> None:
    """Put one member into its sample, or where it is listed as left out."""
    path = PurePosixPath(member.name)
    name = path.as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = name.encode(errors="backslashreplace").decode()
        left_out.append([shown, "file name is not valid text", True])
        return
    where = f"{name} in {shard}"
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where} leads out of the shard: write it again with plain names.")
    stem, _, ending = path.name.partition(".")
    ending = ending.lower()
    is_photo = f".{ending.rpartition('.')[2]}" in EXTENSIONS
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    if hidden or not (is_photo or ending in _LABELS):
        left_out.append([name, "not a photo", False])
    elif not member.isreg() or member.issparse():
        left_out.append([name, "is not a regular file", True])
    elif member.size > MAX_BYTES:
        left_out.append([name, f"more than {MAX_BYTES / 1e6:.0f} MB", True])
    else:
        sample = samples.setdefault(str(path.parent / stem), {})
        kind = "photo" if is_photo else ending
        if kind in sample:
            raise DataError(f"{where} is a second {kind} of its sample: write the shard again.")
        content = tar.extractfile(member)
        if is_photo:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
            sample["photo"] = [name, member.offset_data, member.size, digest]
        else:
            sample[ending] = _label(content.read(), ending, where)


def _label(content: bytes, ending: str, where: str) -> str:
    """The label in a member; "" for JSON that has none, which may be there for another purpose."""
    try:
        text = content.decode("utf-8-sig").strip()
        if ending == "json":
            return str(json.loads(text).get("label", "")).strip()
    except (ValueError, AttributeError, RecursionError):
        text = ""
    if not text:
        raise DataError(f"{where} holds no label: write the shard again.")
    return text
