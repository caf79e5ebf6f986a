"""What a run trains on: the photos, their pixels, their split, and the loaders over them."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from train import distributed
from train.config import MADE_SPLITS, Config, DataConfig, epoch_sizes
from train.data import Photos, Split, limit_photos, load_images, open_photos, split_photos
from train.data.augment import augment_batch
from train.data.cache import default_cache_dir
from train.data.duplicates import picture_groups, thumbnail
from train.data.loader import Loader
from train.data.relabel import Relabelled, only_classes, relabel
from train.data.resident import KERNEL_AUGMENTS, ResidentLoader, upload
from train.data.split import fold_photos, given_split
from train.data.split_file import read_split, split_csv
from train.environment import default_workers
from train.errors import FOREIGN, CheckpointError
from train.files import write_atomically
from train.record import opened, sealed


@dataclass(frozen=True)
class Inputs:
    """images: uint8 [N, S, S, 3], in the order of `photos`; `split` holds rows of both.

    relabelled: what --relabel changed in the labels, None without it.
    """

    images: np.ndarray
    photos: Photos
    split: Split
    relabelled: Relabelled | None = None

    def split_csv(self) -> bytes:
        """split.csv: filename, label and side of every photo."""
        return split_csv(self.split.rows())

    def digest(self) -> str:
        """One SHA-256 over names, contents, labels and split: equal data, equal digest."""
        return digest_of(self.photos.digests, self.split.rows())

    def train_counts(self) -> list[int]:
        """Training photos of each class."""
        labels, classes = self.photos.labels[self.split.train], len(self.photos.classes)
        return np.bincount(labels, minlength=classes).tolist()

    def facts(self) -> dict[str, Any]:
        """The split in numbers, as summary.json holds it."""
        return {
            "kind": self.split.kind,
            "train": len(self.split.train),
            "validation": len(self.split.val),
            "groups": self.split.groups,
            "duplicate_groups": self.split.duplicate_groups,
            "leaked_share": self.split.leaked_share,
            "excluded": len(self.photos.excluded),
            "relabelled": self.relabelled.changed if self.relabelled else 0,
            "dropped": self.relabelled.dropped if self.relabelled else 0,
        }


def digest_of(digests: Sequence[str], rows: Iterable[tuple[str, str, str]]) -> str:
    """One SHA-256 over photos: their contents, and their rows in split.csv."""
    pairs = zip(digests, rows, strict=True)
    return hashlib.sha256(repr(list(pairs)).encode()).hexdigest()


def load_inputs(config: Config) -> Inputs:
    """Open, decode and split the photos of `config`. Raises DataError, DiskError or UsageError."""
    data, seed = config.data, config.run.seed
    classes = data.classes if data.relabel is None else ()  # a row may move a photo between any
    photos, relabelled = open_photos(data.data, classes=classes, seed=seed), None
    if data.relabel is not None:
        photos, relabelled = relabel(photos, data.relabel)
        photos = only_classes(photos, data.classes)
    listed = photos
    if data.limit is not None:
        photos = limit_photos(photos, data.limit, seed)
    images, photos = load_images(photos, stored_size(data), max_bad=data.max_bad)
    pictures = pictures_of(images, photos) if data.val_fraction else None
    split = make_split(config, photos, pictures, listed.files)
    return Inputs(images, photos, split, relabelled)


def make_split(
    config: Config, photos: Photos, pictures: np.ndarray | None, listed: Sequence[str] = ()
) -> Split:
    """The split that `config` or the data asks for, once the user has been told what leaks.

    pictures: as for `split_photos`. listed: all files of the data, also those not among `photos`.
    Raises DataError and UsageError.
    """
    data, seed = config.data, config.run.seed
    made = data.fold is not None or data.val_fraction != DataConfig().val_fraction
    if data.split not in MADE_SPLITS:
        # a resumed run reads its own copy, whatever became of the original
        folder = config.run.resume
        table = Path(data.split) if folder is None else folder / "split.csv"
        left_out = (*listed, *(excluded.file for excluded in photos.excluded))
        sides = read_split(table, photos, left_out, other_classes=bool(data.classes))
        split = given_split(photos, sides, pictures=pictures, origin=data.split)
        _judge(split, data.accept_leak, "make it anew with --split grouped")
        return split
    if photos.sides and data.split == "grouped" and not made:
        origin = "the column split of train.csv"
        split = given_split(photos, photos.sides, pictures=pictures, origin=origin)
        _judge(split, data.accept_leak, "remove the column, and twins are kept together")
        return split
    if photos.sides:
        warnings.warn("the column split of train.csv is not used: flags go first", stacklevel=2)
    if data.accept_leak:
        warnings.warn("--accept-leak has no effect: no split is given", stacklevel=2)
    if data.fold is not None:
        fold = {"fold": data.fold, "folds": data.folds}
        return fold_photos(photos, pictures=pictures, kind=data.split, seed=seed, **fold)
    return split_photos(
        photos, pictures=pictures, val_fraction=data.val_fraction, kind=data.split, seed=seed
    )


def _judge(split: Split, accepted: bool, cure: str) -> None:
    """Say what leaks through a given split, unless that was accepted."""
    if split.leaked_share and not accepted:
        leaked = round(split.leaked_share * len(split.val))
        warnings.warn(
            f"PROBLEM: {leaked} of the {len(split.val)} validation photos "
            f"({split.leaked_share:.0%}) show a picture that is in train too, as {split.kind}, so "
            f"their accuracy is too high: {cure}, or accept it with --accept-leak",
            stacklevel=3,
        )


def stored_size(data: DataConfig) -> int:
    """The side in pixels of the stored squares: augmentation crops and turns, and finds some margin
    around the picture; validation takes their centre."""
    trained = data.image_size if data.augment == "none" else round(data.image_size * 8 / 7)
    return max(trained, round(data.evaluated_size / data.val_crop))


def centres(squares: np.ndarray | torch.Tensor, data: DataConfig) -> np.ndarray | torch.Tensor:
    """Of stored squares [..., S, S, 3] what validation and prediction see, as a view; they resize
    it to `data.evaluated_size`, which is no more."""
    middle = slice(*centre_of(squares.shape[-2], data))
    return squares[..., middle, middle, :]


def centre_of(side: int, data: DataConfig) -> tuple[int, int]:
    """First and last pixel, exclusive, of the centre of `--val-crop` on `side` pixels."""
    size = round(side * data.val_crop)
    first = (side - size) // 2
    return first, first + size


def evaluated(square: np.ndarray, data: DataConfig) -> np.ndarray:
    """A stored square, uint8 [S, S, 3], as validation and prediction see it."""
    views = centres(square[None], data)
    return augment_batch(views, np.zeros(1, np.int64), 0, 0, "none", data.evaluated_size)[0]


def resident_pixels(
    inputs: Inputs, device: torch.device, backend: str, augment: str = "none"
) -> tuple[torch.Tensor | None, str]:
    """The pixels on the GPU, for batches to be made there; None, and why, where that cannot be.

    The size decides, not what happens to be free: a resumed run makes its batches the same way.
    """
    if backend != "triton":
        return None, f"the backend {backend} does not use the kernels"
    if augment not in KERNEL_AUGMENTS:
        return None, f"the kernels know no --augment {augment}"
    size, memory = inputs.images.nbytes, torch.cuda.get_device_properties(device).total_memory
    if 4 * size > memory:
        gigabytes = f"{size / 1e9:.1f} GB is more than a quarter of the GPU's {memory / 1e9:.1f} GB"
        return None, f"the photos' {gigabytes}"
    try:
        return upload(inputs.images, device), f"{size / 1e9:.2f} GB of pixels stay there"
    except torch.OutOfMemoryError:
        return None, f"the GPU has no {size / 1e9:.1f} GB free for the photos"


def pictures_of(images: np.ndarray, photos: Photos) -> np.ndarray:
    """int64 [N], equal for photos that show one picture, found once for a set of photos and
    remembered in the cache folder; images uint8 [N, S, S, 3] are their squares."""
    kind = f"pictures 2 {images.shape[1]}"  # a change of how they are compared makes a new number
    key = hashlib.sha256("\n".join([kind, *photos.digests]).encode()).hexdigest()
    path = default_cache_dir() / f"{key[:32]}.pictures.json"
    try:
        found = np.array(opened(json.loads(path.read_bytes()))["pictures"], dtype=np.int64)
    except FOREIGN:
        found = None
    if found is None or found.shape != (len(photos),):
        squares = np.stack([thumbnail(Image.fromarray(square)) for square in images])
        contents = np.unique(np.asarray(photos.digests), return_inverse=True)[1]
        found = picture_groups(squares, contents)
        write_atomically(path, json.dumps(sealed({"pictures": found.tolist()})).encode())
    return found


def make_loaders(
    inputs: Inputs,
    config: Config,
    dtype: torch.dtype,
    device: torch.device,
    pixels: torch.Tensor | None = None,
) -> tuple[Loader | ResidentLoader, Loader | ResidentLoader | None]:
    """The training loader, and that of the validation photos unless there are none.

    pixels: those of `inputs` on the GPU, from `resident_pixels`; without them threads prepare the
    batches.
    """
    data, split = config.data, inputs.split
    options = {
        "seed": config.run.seed,
        "dtype": dtype,
        "channels_last": config.run.channels_last,
        "part": distributed.rank(),
        "parts": distributed.size(),
    }
    if pixels is None:
        workers = data.workers if data.workers is not None else default_workers(device)
        squares, make = inputs.images, partial(Loader, workers=workers, device=device, **options)
    else:
        squares, make = pixels, partial(ResidentLoader, **options)
    labels, sizes = inputs.photos.labels, config.optim
    train = make(
        squares,
        labels,
        split.train,
        batch_size=sizes.batch_size,
        image_size=epoch_sizes(config),
        augment=data.augment,
        shuffle=True,
        balance=labels[split.train] if data.sampler == "balanced" else None,
    )
    if not len(split.val):
        return train, None
    size, batch_size = data.evaluated_size, sizes.val_batch_size
    seen = centres(squares, data)
    return train, make(seen, labels, split.val, batch_size=batch_size, image_size=size)


def clean_loader(
    inputs: Inputs,
    config: Config,
    rows: np.ndarray,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Loader:
    """The photos `rows` as validation sees them, whole on every process."""
    return Loader(
        centres(inputs.images, config.data),
        inputs.photos.labels,
        rows,
        batch_size=batch_size,
        image_size=config.data.evaluated_size,
        dtype=dtype,
        channels_last=config.run.channels_last,
        workers=0,
        device=device,
    )


def check_same_data(state: dict[str, Any], inputs: Inputs) -> None:
    """Raise CheckpointError, naming the difference, unless `state` was trained on these inputs."""
    classes = list(inputs.photos.classes)
    if state["classes"] != classes:
        raise CheckpointError(
            f"the run was trained on the classes {', '.join(state['classes'])}, the data now has "
            f"{', '.join(classes)}: restore the data, or start a new run"
        )
    if state["data_digest"] != inputs.digest():
        raise CheckpointError(
            "the photos, labels or their split changed since this run began: restore the data, "
            "or start a new run"
        )
