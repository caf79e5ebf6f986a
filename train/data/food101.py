"""`food101:PATH`: the Food-101 set in torchvision's layout (`images/`, `meta/`), never downloaded.

Bossard, Guillaumin, Van Gool: "Food-101, mining discriminative components with random forests",
ECCV 2014. Both of its published parts are read; the split is made here, as for every source.
"""

import json
from pathlib import Path

from train.data.photos import Photos, choose_classes, list_photos
from train.errors import FOREIGN, DataError

PREFIX = "food101:"


def accepts(data: str) -> bool:
    return data.startswith(PREFIX)


def open_source(data: str, *, classes: tuple[str, ...] = (), seed: int = 0) -> Photos:
    """`data` names the folder `food-101` or the one that holds it. Raises DataError."""
    given = Path(data.removeprefix(PREFIX))
    base = given / "food-101" if (given / "food-101").is_dir() else given
    listed: dict[str, list[str]] = {}
    for part in ("train", "test"):
        table = base / "meta" / f"{part}.json"
        try:
            content = json.loads(table.read_text(encoding="utf-8"))
            for label, names in content.items():
                listed.setdefault(label, []).extend(f"{name}.jpg" for name in names)
        except OSError:
            raise DataError(
                f"{given} does not hold Food-101 ({table} cannot be read): unpack food-101.tar.gz "
                "and give the folder that contains food-101/."
            ) from None
        except FOREIGN:
            raise DataError(f"{table} is damaged: unpack food-101.tar.gz again.") from None
    chosen = choose_classes(listed, classes, data)
    entries = [
        (file, label, f"{file} in {base / 'meta'}")
        for label in chosen
        for file in dict.fromkeys(listed[label])
    ]
    return list_photos("food101", base / "images", entries, chosen)
