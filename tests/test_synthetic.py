"""The drawn dishes: deterministic, quick, and not told apart by their colours."""

import hashlib
import time

import cv2
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from train.data import SYNTHETIC, load_images, open_photos, split_photos
from train.data.synthetic import draw

DISHES = ("bakso", "gado_gado", "nasi_goreng", "rendang", "soto_ayam")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The whole default set, and the seconds it took."""
    start = time.perf_counter()
    images, photos = load_images(
        open_photos(SYNTHETIC), 224, cache_dir=tmp_path_factory.mktemp("cache"), progress=False
    )
    return images, photos, time.perf_counter() - start


def test_a_thousand_pictures_in_seconds(drawn):
    images, photos, seconds = drawn
    assert images.shape == (1000, 224, 224, 3)
    assert photos.classes == DISHES
    assert np.bincount(photos.labels).tolist() == [200] * 5
    assert seconds < 30  # 10 on an idle machine of two cores


def test_all_are_distinct_in_pixels_and_digests(drawn):
    images, photos, _ = drawn
    assert len({hashlib.sha256(image.tobytes()).digest() for image in images}) == 1000
    assert len(set(photos.digests)) == len(set(photos.files)) == 1000
    split = split_photos(photos, val_fraction=0.2, kind="grouped", seed=0)
    assert np.bincount(photos.labels[split.val]).tolist() == [40] * 5


def accuracy(features: np.ndarray, labels: np.ndarray, strength: float) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
    return cross_val_score(model, features, labels, cv=5).mean()


def edge_strengths(image: np.ndarray) -> np.ndarray:
    """Mean |Laplacian| of the grey picture at five scales, in a 3 x 3 grid: [45]."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    features = []
    for _ in range(5):
        edges = np.abs(cv2.Laplacian(grey, cv2.CV_32F))
        features.append(np.log1p(cv2.resize(edges, (3, 3), interpolation=cv2.INTER_AREA)).ravel())
        grey = cv2.pyrDown(grey)
    return np.concatenate(features)


def test_mean_colours_tell_little_and_texture_tells_more(drawn):
    images, photos, _ = drawn
    colours = images.mean((1, 2))
    assert accuracy(colours, photos.labels, 1.0) < 0.4
    # how strong edges of each scale are knows nothing of colour: the classes differ in texture
    textures = np.stack([edge_strengths(image) for image in images])
    assert accuracy(textures, photos.labels, 0.1) > 0.5


def test_deterministic_by_seed_and_independent_of_the_selection(drawn):
    images, photos, _ = drawn
    for i in (0, 333, 999):
        dish, number = photos.files[i].removesuffix(".png").split("/")
        assert np.array_equal(images[i], draw(0, dish, int(number)))
        assert np.array_equal(images[i], photos.read(i))
    two = open_photos(SYNTHETIC, classes=("rendang", "bakso"))
    assert two.classes == ("bakso", "rendang")
    i, j = two.files.index("rendang/0007.png"), photos.files.index("rendang/0007.png")
    assert two.digests[i] == photos.digests[j]
    assert np.array_equal(two.read(i), images[j])
    other = open_photos(SYNTHETIC, seed=1)
    assert set(other.digests).isdisjoint(photos.digests)
    assert np.abs(other.read(0).astype(int) - images[0]).mean() > 5


def test_pictures_are_neither_dark_nor_blown_out(drawn):
    small = drawn[0][:, ::4, ::4]
    means, spreads = small.mean((1, 2, 3)), small.std((1, 2, 3))
    assert 40 < np.quantile(means, 0.01)
    assert np.quantile(means, 0.99) < 225
    assert np.quantile(spreads, 0.01) > 20
