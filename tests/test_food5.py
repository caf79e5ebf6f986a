"""The course's photos, where they lie beside the checkout."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data import load_images, open_photos, split_photos
from train.data.duplicates import photo_groups

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

pytestmark = pytest.mark.skipif(not (DATA / "food5").is_dir(), reason="the photos are not here")


def test_food5_has_its_published_duplicates_and_splits_without_leak(tmp_path):
    images, photos = load_images(
        open_photos(str(DATA / "food5")), 128, cache_dir=tmp_path, progress=False
    )
    assert photos.classes == ("bakso", "gado_gado", "nasi_goreng", "rendang", "soto_ayam")
    assert np.bincount(photos.labels).tolist() == [167, 174, 191, 185, 164]
    assert photos.excluded == ()
    split = split_photos(photos, val_fraction=0.2, kind="grouped", seed=0)
    assert (split.groups, split.leaked_share) == (539, 0.0)
    pictures = photo_groups(photos, progress=False)
    assert 430 <= len(set(pictures.tolist())) <= 445
    with pytest.warns(UserWarning, match="a picture that is in train too"):
        seen = split_photos(photos, pictures=pictures, val_fraction=0.2, kind="random", seed=0)
    assert 0.6 < seen.leaked_share < 0.75
    split = split_photos(photos, pictures=pictures, val_fraction=0.2, kind="grouped", seed=0)
    assert split.leaked_share == 0.0
    assert (
        np.abs(np.bincount(photos.labels[split.val]) / np.bincount(photos.labels) - 0.2).max()
        < 0.01
    )
    train = {images[i].tobytes() for i in split.train}
    assert not [i for i in split.val if images[i].tobytes() in train]
    with pytest.warns(UserWarning, match="a picture that is in train too"):
        random = split_photos(photos, val_fraction=0.2, kind="random", seed=0)
    assert 0.5 < random.leaked_share < 0.65


def test_food5_raw_every_messy_original_is_read_right(tmp_path):
    images, photos = load_images(
        open_photos(str(DATA / "food5-raw")), 224, cache_dir=tmp_path, progress=False
    )
    assert len(photos) == 107
    assert photos.excluded == ()
    for i in np.argsort([(DATA / "food5-raw/train" / f).stat().st_size for f in photos.files])[-3:]:
        whole = Image.fromarray(photos.read(i))
        side = min(whole.size)
        left, top = (whole.width - side) // 2, (whole.height - side) // 2
        square = whole.crop((left, top, left + side, top + side))
        expected = np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(images[i] - expected).mean() < 1.5  # of 255: the scaled DCT of huge JPEGs
