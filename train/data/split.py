"""Which photos validate: stratified by class, and by default never apart from a twin.

A random split of a set with copies puts the same picture on both sides, and the validation
accuracy then measures memory. The grouped split moves all copies together: identical files, and
where `duplicates` has compared the pictures also crops, mirrored and re-encoded ones.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from train.data.photos import Photos
from train.errors import DataError, UsageError

Kind = Literal["grouped", "random"]


@dataclass(frozen=True)
class Split:
    """Indices into `photos` for training and validation (int64, sorted), and what they share.

    kind              how it was made, in a few words
    groups            different pictures; duplicate_groups: those with more than one file
    leaked_share      share of validation photos whose picture is in train too, 0 to 1
    """

    photos: Photos = field(repr=False)
    train: np.ndarray = field(repr=False)
    val: np.ndarray = field(repr=False)
    kind: str
    groups: int
    duplicate_groups: int
    leaked_share: float

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(filename, label, "train" or "val") of every photo, in the order of `photos`."""
        val = set(self.val.tolist())
        for i, (file, label) in enumerate(zip(self.photos.files, self.photos.labels, strict=True)):
            yield file, self.photos.classes[label], "val" if i in val else "train"


def split_photos(
    photos: Photos,
    *,
    pictures: np.ndarray | None = None,
    val_fraction: float = 0.2,
    kind: Kind = "grouped",
    seed: int = 0,
) -> Split:
    """A stratified split: each class gives about `val_fraction` of its photos to validation.

    pictures: int [N], equal for photos of one picture (`duplicates.photo_groups`); None knows only
        identical files.
    Every class that can (two photos; grouped: two different pictures) stands on both sides.
    `random` ignores copies, and warns with the share that leaks.
    Raises UsageError for a fraction outside [0, 1).
    """
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction} is not in [0, 1): 0.2 is usual.")
    contents = _contents(photos, pictures)
    in_val = np.zeros(len(photos), dtype=bool)
    if val_fraction:
        for label, own in enumerate(_groups_of_classes(photos, contents, kind)):
            for group in _choose(own, val_fraction, np.random.default_rng((seed, label))):
                in_val[group] = True
    return _warned(_split(photos, in_val, contents, kind))


def fold_photos(
    photos: Photos,
    *,
    fold: int,
    folds: int,
    pictures: np.ndarray | None = None,
    kind: Kind = "grouped",
    seed: int = 0,
) -> Split:
    """Fold `fold` of 1 .. `folds` validates and the others train; each photo is in one fold.

    Each class is dealt out evenly, its largest groups first, to the fold that has the fewest of it.
    pictures, kind: as for `split_photos`. Raises UsageError where a class has too few different
    pictures to stand in every fold.
    """
    contents = _contents(photos, pictures)
    numbers = np.zeros(len(photos), dtype=np.int64)
    sizes = [0] * folds
    for label, own in enumerate(_groups_of_classes(photos, contents, kind)):
        if len(own) < folds:
            raise UsageError(
                f"--folds {folds}: class {photos.classes[label]} has {len(own)} different "
                "pictures and cannot stand in every fold: "
                + (f"--folds {len(own)} can" if len(own) > 1 else "add photos, or leave it out")
                + "."
            )
        held = [0] * folds
        shuffled = np.random.default_rng((seed, label)).permutation(len(own))
        for i in sorted(shuffled, key=lambda i: -len(own[i])):
            number = min(range(folds), key=lambda n: (held[n], sizes[n]))
            numbers[own[i]] = number + 1
            held[number] += len(own[i])
            sizes[number] += len(own[i])
    how = f"{kind}, fold {fold} of {folds}"
    return _warned(_split(photos, numbers == fold, contents, how))


def given_split(
    photos: Photos, sides: Sequence[str], *, pictures: np.ndarray | None = None, origin: str
) -> Split:
    """The split of N `sides`, "train" or "val"; origin: where they come from, for people.

    Raises DataError for a class without training photos; what leaks is the caller's to judge.
    """
    in_val = np.array([side == "val" for side in sides], dtype=bool)
    trained = np.bincount(photos.labels[~in_val], minlength=len(photos.classes))
    if not trained.all():
        raise DataError(
            f"{origin} leaves class {photos.classes[int(trained.argmin())]} without photos in "
            "train: move some of them there."
        )
    return _split(photos, in_val, _contents(photos, pictures), f"given by {origin}")


def _contents(photos: Photos, pictures: np.ndarray | None) -> np.ndarray:
    """int64 [N], from 0: equal where the same picture is shown."""
    shown = np.asarray(photos.digests) if pictures is None else pictures
    return np.unique(shown, return_inverse=True)[1]


def _groups_of_classes(photos: Photos, contents: np.ndarray, kind: Kind) -> list[list[np.ndarray]]:
    """For each class the groups, as positions, that must not be parted; a group of several labels
    belongs to the most frequent."""
    members = _members(contents if kind == "grouped" else np.arange(len(photos)))
    owner = np.array([np.bincount(photos.labels[m]).argmax() for m in members])
    return [
        [members[g] for g in np.flatnonzero(owner == label)] for label in range(len(photos.classes))
    ]


def _split(photos: Photos, in_val: np.ndarray, contents: np.ndarray, kind: str) -> Split:
    leaked = np.isin(contents[in_val], contents[~in_val])
    sizes = np.bincount(contents)
    return Split(
        photos=photos,
        train=np.flatnonzero(~in_val),
        val=np.flatnonzero(in_val),
        kind=kind,
        groups=len(sizes),
        duplicate_groups=int((sizes > 1).sum()),
        leaked_share=float(leaked.mean()) if leaked.size else 0.0,
    )


def _warned(split: Split) -> Split:
    """`split`, once the user has been told what leaks."""
    if split.leaked_share:
        warnings.warn(
            f"--split {split.kind}: {split.leaked_share:.0%} of the validation photos show a "
            "picture that is in train too, so their accuracy is too high; --split grouped keeps "
            "twins together.",
            stacklevel=3,
        )
    return split


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """The positions of each group, for group numbers 0 .. G-1."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.cumsum(np.bincount(groups))[:-1])


def _choose(
    groups: list[np.ndarray], fraction: float, generator: np.random.Generator
) -> list[np.ndarray]:
    """Groups of one class for validation, near to `fraction` of its photos; never all of them."""
    if len(groups) < 2:
        return []
    missing = max(1, round(fraction * sum(map(len, groups))))
    chosen, rest = [], []
    for i in generator.permutation(len(groups)):
        fits = len(groups[i]) <= missing
        (chosen if fits else rest).append(groups[i])
        missing -= len(groups[i]) if fits else 0
    chosen.sort(key=len)
    rest.sort(key=len)
    if not rest:
        chosen.pop(0)
    elif len(rest) > 1 and (not chosen or len(rest[0]) < 2 * missing):
        chosen.append(rest[0])
    return chosen


def limit_photos(photos: Photos, n: int, seed: int = 0) -> Photos:
    """`n` photos drawn at random, each class keeping its share; all of them if there are fewer.

    Raises UsageError if that leaves a class with fewer than two photos.
    """
    if n >= len(photos):
        return photos
    counts = np.bincount(photos.labels, minlength=len(photos.classes))
    exact = counts * (n / len(photos))
    quota = np.floor(exact).astype(int)
    largest_remainders = np.argsort(quota - exact, kind="stable")
    quota[largest_remainders[: n - quota.sum()]] += 1
    if quota.min() < 2:
        scarce = photos.classes[int(quota.argmin())]
        raise UsageError(
            f"--limit {n} leaves class {scarce} with {quota.min()} photos: take more, each class "
            "needs at least two."
        )
    chosen = [
        # numbers of their own: those of a split would keep one of its sides
        np.random.default_rng((seed, label, 1)).permutation(np.flatnonzero(photos.labels == label))[
            :k
        ]
        for label, k in enumerate(quota)
    ]
    return photos.subset(np.sort(np.concatenate(chosen)))
