"""The split: stratified, and no content ever on both sides."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from train import inputs
from train.data import Photos, limit_photos, split_photos
from train.data.dishes import DISHES
from train.data.split import fold_photos
from train.data.synthetic import draw
from train.errors import UsageError


def photos_of(contents: list[int], labels: list[int], classes: int) -> Photos:
    return Photos(
        name="made up",
        classes=tuple(f"class{k}" for k in range(classes)),
        files=tuple(f"{i}.jpg" for i in range(len(contents))),
        labels=np.array(labels, dtype=np.int64),
        digests=tuple(f"{c:064x}" for c in contents),
        excluded=(),
        load=None,
    )


@st.composite
def sets_of_photos(draw, one_label_a_content: bool):
    classes = draw(st.integers(2, 4))
    size = draw(st.integers(classes, 80))
    contents = draw(st.lists(st.integers(0, size), min_size=size, max_size=size))
    if one_label_a_content:
        labels = [content % classes for content in contents]
    else:
        labels = draw(st.lists(st.integers(0, classes - 1), min_size=size, max_size=size))
    return photos_of(contents, labels, classes)


fractions = st.floats(0.05, 0.9)
seeds = st.integers(0, 2**40)


@settings(max_examples=200, deadline=None)
@given(sets_of_photos(one_label_a_content=False), fractions, seeds)
def test_no_content_on_both_sides_and_every_photo_on_one(photos, fraction, seed):
    split = split_photos(photos, val_fraction=fraction, kind="grouped", seed=seed)
    both = sorted([*split.train.tolist(), *split.val.tolist()])
    assert both == list(range(len(photos)))
    train = {photos.digests[i] for i in split.train}
    assert train.isdisjoint(photos.digests[i] for i in split.val)
    assert split.leaked_share == 0
    counts = np.unique(photos.digests, return_counts=True)[1]
    assert (split.groups, split.duplicate_groups) == (len(counts), (counts > 1).sum())


@settings(max_examples=200, deadline=None)
@given(sets_of_photos(one_label_a_content=True), fractions, seeds)
def test_every_class_on_both_sides_and_near_its_fraction(photos, fraction, seed):
    split = split_photos(photos, val_fraction=fraction, kind="grouped", seed=seed)
    for label in range(len(photos.classes)):
        own = np.flatnonzero(photos.labels == label)
        sizes = np.unique([photos.digests[i] for i in own], return_counts=True)[1]
        in_val = np.isin(own, split.val).sum()
        if len(sizes) < 2:
            assert in_val == 0
        else:
            assert 0 < in_val < len(own)
            assert abs(in_val - fraction * len(own)) <= max(sizes)


def test_fraction_is_met_to_a_photo_where_single_photos_allow_it():
    contents = [*range(60), *[60] * 20, *range(100, 200)]
    split = split_photos(
        photos_of(contents, [0] * 80 + [1] * 100, 2), val_fraction=0.2, kind="grouped", seed=3
    )
    assert np.sum(split.val < 80) == 16
    assert np.sum(split.val >= 80) == 20


def test_the_split_depends_on_the_seed_alone():
    photos = photos_of(list(range(100)), [i % 2 for i in range(100)], 2)
    first, again, other = (
        split_photos(photos, val_fraction=0.2, kind="grouped", seed=seed) for seed in (1, 1, 2)
    )
    assert np.array_equal(first.val, again.val)
    assert not np.array_equal(first.val, other.val)


def test_random_split_warns_with_the_measured_leak():
    photos = photos_of([i // 2 for i in range(200)], [i // 100 for i in range(200)], 2)
    with pytest.warns(UserWarning, match=r"--split random: \d+% of the validation photos"):
        split = split_photos(photos, val_fraction=0.2, kind="random", seed=0)
    assert np.bincount(photos.labels[split.val]).tolist() == [20, 20]
    train = {photos.digests[i] for i in split.train}
    leaked = [photos.digests[i] in train for i in split.val]
    assert split.leaked_share == pytest.approx(np.mean(leaked))
    assert split.leaked_share > 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_photos(photos, val_fraction=0.2, kind="grouped", seed=0)


def test_rows_and_no_validation():
    photos = photos_of([0, 1, 2, 3], [0, 1, 0, 1], 2)
    split = split_photos(photos, val_fraction=0.5, kind="grouped", seed=0)
    rows = list(split.rows())
    assert [row[:2] for row in rows] == [
        ("0.jpg", "class0"),
        ("1.jpg", "class1"),
        ("2.jpg", "class0"),
        ("3.jpg", "class1"),
    ]
    assert [i for i, row in enumerate(rows) if row[2] == "val"] == split.val.tolist()
    assert {row[2] for row in rows} == {"train", "val"}
    everything = split_photos(photos, val_fraction=0, kind="grouped", seed=0)
    assert everything.train.tolist() == [0, 1, 2, 3]
    assert everything.val.size == 0
    assert everything.leaked_share == 0
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(UsageError, match="--val-fraction"):
            split_photos(photos, val_fraction=fraction, kind="grouped", seed=0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(4, 60), min_size=2, max_size=5), st.data())
def test_limit_keeps_the_shares(counts, data):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    photos = photos_of(list(range(len(labels))), labels, len(counts))
    n = data.draw(st.integers(1, len(labels) + 3))
    exact = np.array(counts) * min(1, n / len(labels))
    if np.floor(exact).min() < 2:
        return
    limited = limit_photos(photos, n, seed=5)
    assert len(limited) == min(n, len(labels))
    assert np.abs(np.bincount(limited.labels) - exact).max() < 1
    assert len(set(limited.files)) == len(limited)
    assert limited.files == limit_photos(photos, n, seed=5).files


def test_a_limit_too_small_for_the_classes():
    photos = photos_of(list(range(20)), [i % 4 for i in range(20)], 4)
    with pytest.raises(UsageError, match="--limit 6"):
        limit_photos(photos, 6, seed=0)


def test_groups_of_pictures_stay_together_and_count_as_one():
    """Forty different files that show twenty pictures: nothing of a picture is on both sides, and a
    random split is told what it leaks."""
    photos = photos_of(list(range(40)), [i // 20 for i in range(40)], 2)
    pictures = np.arange(40) // 2
    split = split_photos(photos, pictures=pictures, val_fraction=0.25, seed=3)
    assert not set(pictures[split.val]) & set(pictures[split.train])
    assert (split.groups, split.duplicate_groups, split.leaked_share) == (20, 20, 0.0)
    with pytest.warns(UserWarning, match="show a picture that is in train too"):
        leaking = split_photos(photos, pictures=pictures, val_fraction=0.25, kind="random", seed=3)
    assert leaking.leaked_share > 0.5


def test_pictures_are_compared_once_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path))
    drawn = [np.asarray(draw(0, sorted(DISHES)[i % len(DISHES)], i)) for i in range(6)]
    squares = np.stack([*drawn, drawn[2][:, ::-1]])
    photos = photos_of(list(range(7)), [0, 1, 0, 1, 0, 1, 0], 2)
    found = inputs.pictures_of(squares, photos)
    assert found[6] == found[2]
    assert len(set(found.tolist())) == 6
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "picture_groups", None)
        assert (inputs.pictures_of(squares, photos) == found).all()
    (remembered,) = tmp_path.glob("*.pictures.json")
    for damaged in ("[0, 1", "[0, 1, 2, 3, 4, 5, 6]"):
        remembered.write_text(damaged)
        assert (inputs.pictures_of(squares, photos) == found).all()


@settings(max_examples=100, deadline=None)
@given(sets_of_photos(one_label_a_content=False), st.integers(2, 5), seeds)
def test_folds_are_a_partition_that_parts_no_picture(photos, folds, seed):
    try:
        splits = [fold_photos(photos, fold=k + 1, folds=folds, seed=seed) for k in range(folds)]
    except UsageError as error:
        # the class it names has too few pictures to be in every fold
        label = photos.classes.index(str(error).split("class ")[1].split(" has")[0])
        own = {photos.digests[i] for i in np.flatnonzero(photos.labels == label)}
        mixed = {photos.digests[i] for i in np.flatnonzero(photos.labels != label)}
        assert len(own - mixed) < folds
        return
    assert sorted(np.concatenate([s.val for s in splits]).tolist()) == list(range(len(photos)))
    largest = np.unique(photos.digests, return_counts=True)[1].max()
    sizes = [len(s.val) for s in splits]
    assert max(sizes) - min(sizes) <= largest * len(photos.classes)
    for split in splits:
        assert sorted([*split.train, *split.val]) == list(range(len(photos)))
        train = {photos.digests[i] for i in split.train}
        assert train.isdisjoint(photos.digests[i] for i in split.val)
        assert split.leaked_share == 0


def test_a_large_group_is_met_by_many_small_ones():
    photos = photos_of([0] * 8 + list(range(1, 9)) + list(range(20, 36)), [0] * 16 + [1] * 16, 2)
    for fold in (1, 2):
        val = fold_photos(photos, fold=fold, folds=2, seed=4).val
        assert np.bincount(photos.labels[val]).tolist() == [8, 8]


def test_folds_are_stratified_and_a_function_of_the_seed():
    """Against scikit-learn's grouped stratified folds: as even, class by class."""
    rng = np.random.default_rng(0)
    contents = np.repeat(np.arange(150), rng.integers(1, 4, 150)).tolist()
    photos = photos_of(contents, [c % 3 for c in contents], 3)
    splits = [fold_photos(photos, fold=k, folds=5, seed=1) for k in range(1, 6)]
    counts = np.array([np.bincount(photos.labels[s.val], minlength=3) for s in splits])
    assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all()
    theirs = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    parts = theirs.split(np.zeros(len(photos)), photos.labels, contents)
    spread = np.array([np.bincount(photos.labels[val], minlength=3) for _, val in parts])
    assert (np.ptp(counts, axis=0) <= np.ptp(spread, axis=0)).all()
    assert counts.sum(axis=1).max() - counts.sum(axis=1).min() <= 1
    again = fold_photos(photos, fold=2, folds=5, seed=1)
    assert np.array_equal(again.val, splits[1].val)
    assert not np.array_equal(fold_photos(photos, fold=2, folds=5, seed=2).val, again.val)
    assert splits[1].kind == "grouped, fold 2 of 5"
    with pytest.warns(UserWarning, match=r"--split random, fold 1 of 5: \d+% of the validation"):
        random = fold_photos(photos, fold=1, folds=5, kind="random", seed=1)
    assert random.leaked_share > 0.3
    with pytest.raises(UsageError, match=r"--folds 60: class class0 has 50 .*--folds 50 can"):
        fold_photos(photos, fold=1, folds=60)
