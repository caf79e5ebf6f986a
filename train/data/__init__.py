"""Photos: where they come from, how they are split, cached, augmented and fed to a training."""

from train.data import csv_folder, folder, food101, shards, synthetic
from train.data.cache import load_images
from train.data.loader import Batch, Loader
from train.data.photos import Excluded, Photos, UnreadablePhoto
from train.data.split import Split, limit_photos, split_photos
from train.errors import DataError

SYNTHETIC = synthetic.NAME

# Asked in this order; the first that accepts the value of --data opens it.
SOURCES = (synthetic, food101, shards, csv_folder, folder)

__all__ = [
    "SOURCES",
    "SYNTHETIC",
    "Batch",
    "Excluded",
    "Loader",
    "Photos",
    "Split",
    "UnreadablePhoto",
    "limit_photos",
    "load_images",
    "open_photos",
    "split_photos",
]


def open_photos(data: str, *, classes: tuple[str, ...] = (), seed: int = 0) -> Photos:
    """The photos that `data` names, none of them decoded yet.

    data: "synthetic", "food101:PATH", "shards:PATTERN", a folder with train.csv and train/, or a
        folder per class.
    classes: keep only these. seed: of the drawings; photo folders ignore it.
    Raises DataError or UsageError with one sentence and the cure.
    """
    for source in SOURCES:
        if source.accepts(data):
            return source.open_source(data, classes=classes, seed=seed)
    raise DataError(
        f"--data {data} is no folder: give a folder with train.csv and train/, a folder per class, "
        f"food101:PATH, shards:PATTERN or {SYNTHETIC}."
    )
