"""A folder per class: `PATH/bakso/1.jpg`, `PATH/rendang/a/2.jpg`, ..."""

from pathlib import Path

from train.data.photos import Excluded, Photos, choose_classes, list_photos, photo_files
from train.errors import DataError

_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


def accepts(data: str) -> bool:
    return Path(data).is_dir()


def open_source(data: str, *, classes: tuple[str, ...] = (), seed: int = 0) -> Photos:
    """The class is the name of the first folder. Raises DataError for an empty class."""
    root = Path(data)
    try:
        children = sorted(root.iterdir())
    except OSError as error:
        raise DataError(f"{root} cannot be listed ({error.strerror}).") from None
    junk = [
        Excluded(child.name, "not in a class folder", bad=False)
        for child in children
        if not child.is_dir() or _hidden(child)
    ]
    folders = {child.name: child for child in children if child.is_dir() and not _hidden(child)}
    if not folders:
        raise DataError(
            f"{root} has no folder per class and no train.csv: sort the photos into folders named "
            "after their class, or list them in train.csv (filename,label) beside train/."
        )
    if {name.lower() for name in folders} <= _SPLIT_NAMES:
        raise DataError(
            f"{root} holds {', '.join(folders)} instead of classes: give one of them as --data."
        )
    chosen = choose_classes(folders, classes, str(root))
    entries = []
    for label in chosen:
        files, beside = photo_files(folders[label])
        if not files:
            raise DataError(f"class folder {folders[label]} has no photos: fill it or remove it.")
        entries += [(f"{label}/{file}", label, f"{folders[label] / file}") for file in files]
        junk += [Excluded(f"{label}/{e.file}", e.reason, e.bad) for e in beside]
    return list_photos(root.resolve().name, root, entries, chosen, junk)


def _hidden(folder: Path) -> bool:
    return folder.name.startswith(".") or folder.name == "__MACOSX"
