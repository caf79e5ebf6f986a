"""Write photos into tar files for `--data shards:DIR`: `python -m train.data.pack PATH --out DIR`.

The photos are mixed, so that every shard holds every class, and stored as they are, beside their
label as WebDataset writes it: 000017.jpg, 000017.cls (a number), and classes.txt beside the shards.
"""

import io
import os
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from train.arguments import flowing
from train.data import Photos, open_photos
from train.data.shards import CLASSES
from train.errors import LapisError, UsageError
from train.files import unwritable, write_atomically


@flowing
@dataclass(frozen=True)
class Options:
    """What to pack, and where to."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """A folder with train.csv + train/, a folder per class, or food101:PATH."""
    out: Path
    """Folder for the shards; it must not hold any yet."""
    shard_mb: float = 500.0
    """Size of a shard in megabytes."""
    seed: int = 0
    """Seed of the order."""


def main(argv: Sequence[str] | None = None) -> int:
    """Pack as the flags say; returns the exit code."""
    options = tyro.cli(Options, prog="python -m train.data.pack", description=__doc__, args=argv)
    try:
        shards = pack(open_photos(options.data), options.out, options.shard_mb, options.seed)
    except LapisError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{shards} shards in {options.out}: --data shards:{options.out}")
    return 0


def pack(photos: Photos, out: Path, shard_mb: float, seed: int) -> int:
    """Write the shards; returns how many. Raises UsageError, DataError or DiskError."""
    if not hasattr(photos.load, "read"):
        raise UsageError(f"{photos.name} has no photo files: give a folder of photos.")
    if shard_mb <= 0:
        raise UsageError(f"--shard-mb {shard_mb} is not positive.")
    if list(out.glob("*.tar")):
        raise UsageError(f"--out {out} holds shards already: give another folder.")
    order = np.random.default_rng(seed).permutation(len(photos))
    places = iter(tqdm(order.tolist(), "packing", unit=" photos", delay=1))
    count, place = 0, next(places, None)
    try:
        out.mkdir(parents=True, exist_ok=True)
        while place is not None:
            shard = out / f"{photos.name}-{count:06}.tar"
            partial = shard.with_suffix(".partial")
            with tarfile.open(partial, "w") as tar:
                while place is not None and tar.offset < shard_mb * 1e6:
                    ending = PurePosixPath(photos.files[place]).suffix.lower()
                    _add(tar, f"{place:09}{ending}", photos.load.read(photos.files[place]))
                    _add(tar, f"{place:09}.cls", str(photos.labels[place]).encode())
                    place = next(places, None)
            os.replace(partial, shard)
            count += 1
    except OSError as error:
        raise unwritable(out, error) from error
    write_atomically(out / CLASSES, ("\n".join(photos.classes) + "\n").encode())
    return count


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    sys.exit(main())
