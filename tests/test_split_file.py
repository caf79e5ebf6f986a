"""Split files: what a run writes is read back exactly, and nothing else is taken for a split."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_split import photos_of
from train.config import DEFAULT, check
from train.data import split_photos
from train.data.photos import Excluded
from train.data.split import given_split
from train.data.split_file import read_split, split_csv
from train.errors import DataError, UsageError
from train.inputs import make_split

PHOTOS = photos_of(list(range(6)), [0, 1, 0, 1, 0, 1], 2)
TEXT = "filename,label,split\n" + "".join(
    f"{i}.jpg,class{i % 2},{'val' if i in (1, 4) else 'train'}\n" for i in range(6)
)
SIDES = ("train", "val", "train", "train", "val", "train")


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "split.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# everything a file name may hold that is text, and what people call their classes
names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(names, min_size=4, max_size=20, unique=True),
    st.lists(names.filter(str.strip), min_size=2, max_size=3, unique=True),
    st.integers(0, 99),
)
def test_a_split_is_read_back_exactly(tmp_path_factory, files, classes, seed):
    photos = replace(
        photos_of(list(range(len(files))), [i % len(classes) for i in range(len(files))], 3),
        files=tuple(files),
        classes=tuple(classes),
    )
    split = split_photos(photos, val_fraction=0.3, seed=seed)
    table = written(tmp_path_factory.mktemp("split"), split_csv(split.rows()))
    again = given_split(photos, read_split(table, photos), origin="x")
    assert np.array_equal(again.train, split.train)
    assert np.array_equal(again.val, split.val)


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.replace("\n", "\r\n"),
        "\ufeff" + TEXT,
        TEXT.replace(",", ";"),
        TEXT.replace(",", " , "),
        TEXT.replace("val", "VAL").replace("\n", "\n\n"),
        TEXT.replace("0.jpg", "./0.jpg"),
    ],
    ids=["plain", "crlf", "bom", "semicolon", "spaces", "case and blank", "dot"],
)
def test_split_files_as_people_save_them(tmp_path, text):
    assert read_split(written(tmp_path, text), PHOTOS) == SIDES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename,label\n0.jpg,class0\n", "one column split"),
        (TEXT.replace("3.jpg,class1,train", "3.jpg,class1,test"), "row 5 .*split 'test': write"),
        (TEXT.replace("3.jpg,class1,train", "3.jpg,class1"), "row 5 .*split ''"),
        (TEXT + "2.jpg,class0,train\n", "row 8 .*2.jpg again, after row 4: delete one"),
        (TEXT + "7.jpg,class0,train\n", "row 8 .*'7.jpg', which is not in the data"),
        (TEXT + "9.jpg,other,train\n", "row 8 .*'9.jpg', which is not in the data"),
        (TEXT.replace("2.jpg,class0", "2.jpg,class1"), "row 4 .*'class1', the data says 'class0'"),
        (TEXT.replace("2.jpg,class0,train\n", ""), "no row for 1 of the 6 photos .first: 2.jpg"),
        ("", "one column filename|no row for 6"),
        (b"\xff\xfe\x00", "not UTF-8|NUL"),
    ],
)
def test_a_split_file_that_does_not_fit_names_the_row_and_the_cure(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as error:
        read_split(written(tmp_path, text), PHOTOS)
    assert "split.csv" in str(error.value)


def test_rows_of_photos_left_out_count_for_nothing(tmp_path):
    table = written(tmp_path, TEXT + "bad.jpg,class1,val\nother.jpg,soup,val\n")
    assert read_split(table, PHOTOS, ["bad.jpg"], other_classes=True) == SIDES
    with pytest.raises(DataError, match=r"row 9 .*'other.jpg'"):
        read_split(table, PHOTOS, ["bad.jpg"])
    with pytest.raises(DataError, match=r"row 8 .*'bad.jpg'"):
        read_split(table, PHOTOS, other_classes=True)


def config(**data):
    return replace(DEFAULT, data=replace(DEFAULT.data, **data))


def test_the_flags_choose_the_split(tmp_path):
    table = written(tmp_path, TEXT)
    split = make_split(config(split=str(table)), PHOTOS, None)
    assert split.val.tolist() == [1, 4]
    assert split.kind == f"given by {table}"
    limited = make_split(config(split=str(table)), PHOTOS.subset([0, 1, 3]), None, PHOTOS.files)
    assert limited.val.tolist() == [1]
    kept = replace(PHOTOS.subset([0, 1, 2, 3, 5]), excluded=(Excluded("4.jpg", "damaged"),))
    assert make_split(config(split=str(table)), kept, None).val.tolist() == [1]
    parts = [make_split(config(fold=k, folds=3), PHOTOS, None).val.tolist() for k in (1, 2, 3)]
    assert sorted(np.concatenate(parts)) == list(range(6))
    sided = replace(PHOTOS, sides=SIDES)
    assert make_split(config(), sided, None).val.tolist() == [1, 4]
    for flags in ({"fold": 1, "folds": 3}, {"val_fraction": 0.5}, {"split": "random"}):
        with pytest.warns(UserWarning, match="column split of train.csv is not used"):
            assert "given" not in make_split(config(**flags), sided, None).kind


def test_a_given_split_that_leaks_is_a_problem_unless_accepted(tmp_path):
    photos = replace(PHOTOS, digests=tuple("aabcdb"))  # 1 is 0 again, 5 is 2 again
    table = written(tmp_path, TEXT)
    with pytest.warns(UserWarning, match=r"^PROBLEM: 1 of the 2 .*\(50%\).*--accept-leak$"):
        split = make_split(config(split=str(table)), photos, None)
    assert split.leaked_share == 0.5
    with pytest.warns(UserWarning, match=r"^PROBLEM: 1 of the 2 .*remove the column"):
        make_split(config(), replace(photos, sides=SIDES), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accepted = make_split(config(split=str(table), accept_leak=True), photos, None)
        make_split(config(split=str(table)), PHOTOS, None)
    assert accepted.leaked_share == 0.5
    with pytest.warns(UserWarning, match="--accept-leak has no effect"):
        make_split(config(accept_leak=True), PHOTOS, None)


def test_a_given_split_without_training_photos_of_a_class(tmp_path):
    text = TEXT.replace("class1,train", "class1,val")
    with pytest.raises(DataError, match="leaves class class1 without photos in train"):
        make_split(config(split=str(written(tmp_path, text))), PHOTOS, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"split": "groupd"}, "--split groupd is no file: give grouped, random"),
        ({"fold": 1}, "--fold and --folds need each other"),
        ({"folds": 5}, "--fold and --folds need each other"),
        ({"fold": 0, "folds": 5}, "--fold 0 --folds 5"),
        ({"fold": 6, "folds": 5}, "--fold 6 --folds 5"),
        ({"fold": 1, "folds": 1}, "--fold 1 --folds 1"),
        ({"fold": 1, "folds": 5, "val_fraction": 0.3}, "--val-fraction has no effect"),
        ({"split": __file__, "val_fraction": 0.3}, "--val-fraction has no effect"),
        ({"split": __file__, "fold": 1, "folds": 5}, "--fold has no effect"),
    ],
)
def test_flags_that_cannot_go_together(flags, message):
    with pytest.raises(UsageError, match=message):
        check(config(**flags))
    check(config(fold=5, folds=5))
