"""What a run trains on: the photos, their pixels, their split, and the loaders over them."""

import csv
import hashlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from train.config import Config
from train.data import Photos, Split, limit_photos, load_images, open_photos, split_photos
from train.data.loader import Loader
from train.environment import default_workers
from train.errors import CheckpointError


@dataclass(frozen=True)
class Inputs:
    """images: uint8 [N, S, S, 3], in the order of `photos`; `split` holds rows of both."""

    images: np.ndarray
    photos: Photos
    split: Split

    def split_csv(self) -> bytes:
        """split.csv: filename, label and side of every photo."""
        text = io.StringIO()
        csv.writer(text).writerows([("filename", "label", "split"), *self.split.rows()])
        return text.getvalue().encode()

    def digest(self) -> str:
        """One SHA-256 over names, contents, labels and split: equal data, equal digest."""
        rows = zip(self.photos.digests, self.split.rows(), strict=True)
        return hashlib.sha256(repr(list(rows)).encode()).hexdigest()

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
        }


def load_inputs(config: Config) -> Inputs:
    """Open, decode and split the photos of `config`. Raises DataError, DiskError or UsageError."""
    data, seed = config.data, config.run.seed
    photos = open_photos(data.data, classes=data.classes, seed=seed)
    if data.limit is not None:
        photos = limit_photos(photos, data.limit, seed)
    # augmentation crops and turns: it finds some margin around the picture
    store = data.image_size if data.augment == "none" else round(data.image_size * 8 / 7)
    images, photos = load_images(photos, store)
    split = split_photos(photos, val_fraction=data.val_fraction, kind=data.split, seed=seed)
    return Inputs(images, photos, split)


def make_loaders(
    inputs: Inputs, config: Config, dtype: torch.dtype, device: torch.device
) -> tuple[Loader, Loader | None]:
    """The training loader, and that of the validation photos unless there are none."""
    data, split, labels = config.data, inputs.split, inputs.photos.labels
    options = {
        "image_size": data.image_size,
        "seed": config.run.seed,
        "dtype": dtype,
        "channels_last": config.run.channels_last,
        "workers": data.workers if data.workers is not None else default_workers(device),
        "device": device,
    }
    train = Loader(
        inputs.images,
        labels,
        split.train,
        batch_size=config.optim.batch_size,
        augment=data.augment,
        shuffle=True,
        **options,
    )
    if not len(split.val):
        return train, None
    size = config.optim.val_batch_size
    return train, Loader(inputs.images, labels, split.val, batch_size=size, **options)


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
