"""Labels that look wrong: photos whose class, judged by all other pictures, is unlikely.

A linear classifier of colour and texture is trained in folds, so that it judges only pictures it
has never seen, nor a copy of them. A photo whose own class is far less likely than is usual for
that class has a suspect label (confident learning: Northcutt, Jiang and Chuang, "Estimating
uncertainty in dataset labels", JAIR 2021). One that is unlike every other picture may show nothing
of any class: text, a drawing, a logo. Both count into one score. It proposes; a person decides.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from train.data.cache import square
from train.data.duplicates import by_appearance, in_order
from train.data.photos import Photos, UnreadablePhoto

# Chosen on the course's photos, whose wrong labels were told by eye, and on drawn dishes with 5 %
# of the labels exchanged (tests/test_suspects.py).
SUSPICIOUS = 0.8  # least score of a suspect
FOLDS = 10
_SIDE = 128  # pixels of the centre square that is judged
_OCTAVES = 4
_WEIGHTS = (1.0, 0.5, 0.25)  # of colour, texture and flatness
_STRENGTH = 2.0  # of the classifier: the inverse of its penalty
_NEIGHBOURS = 10
_PART = 1024  # samples whose neighbours are looked up at once
_JUNK = 2.0  # quartile distances above the median: Tukey's bound of what is still usual


@dataclass(frozen=True)
class Suspect:
    """A photo whose label looks wrong.

    photo      its position
    suggested  the class it looks like; empty where it looks like none
    score      0 to 1, higher is more suspicious
    """

    photo: int
    suggested: str
    score: float


def find_suspects(
    photos: Photos, pictures: np.ndarray, readable: np.ndarray, *, progress: bool = True
) -> list[Suspect]:
    """The photos whose labels look wrong, the most suspicious first, copies side by side.

    pictures: int [N], equal for photos that show the same. readable: the positions to judge. A
    picture is judged once under each of its labels. Classes of fewer than FOLDS pictures are too
    few to learn from and are not judged.
    """
    classes = len(photos.classes)
    first, judged_as = by_appearance(pictures[readable] * classes + photos.labels[readable])
    large = np.bincount(photos.labels[readable[first]], minlength=classes) >= FOLDS
    judged = np.flatnonzero(large[photos.labels[readable[first]]])
    chosen = readable[first[judged]]
    if large.sum() < 2:
        return []
    labels = photos.labels[chosen]
    features = _all_features(photos, [photos.files[i] for i in chosen], progress)
    chances = out_of_fold(features, labels, pictures[chosen], progress=progress)
    strange = strangeness(features, progress=progress)
    scores, likeliest = score(chances, labels, strange)
    found = []
    for k in np.argsort(-scores, kind="stable"):
        if scores[k] < SUSPICIOUS:
            break
        none = strange[k] > _JUNK or likeliest[k] == labels[k]
        suggested = "" if none else photos.classes[likeliest[k]]
        copies = readable[judged_as == judged[k]].tolist()
        found += [Suspect(i, suggested, round(float(scores[k]), 3)) for i in copies]
    return found


def score(
    chances: np.ndarray, labels: np.ndarray, strange: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How suspicious each label is, float64 [N] from 0 to 1, and the class that fits best.

    score = 1 - min(1, p_own / t_own) exp(-max(0, strange) / 2)

    chances: p, [N, K]. labels: int [N]. t_j, the mean of p_j over the samples labelled j, is the
    chance that is usual for the class: what is hard to tell or rare is not suspicious for that. The
    best fit is the largest p_j / t_j.
    """
    counts = np.bincount(labels, minlength=chances.shape[1])
    own = chances[np.arange(len(labels)), labels]
    usual = np.bincount(labels, own, chances.shape[1]) / np.maximum(counts, 1)
    relative = np.where(usual > 0, chances / np.maximum(usual, 1e-12), 0.0)
    typical = np.exp(-np.maximum(0, strange) / 2)
    mine = np.minimum(1, relative[np.arange(len(labels)), labels])
    return 1 - mine * typical, relative.argmax(1)


def out_of_fold(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, progress: bool = True
) -> np.ndarray:
    """Chances of the classes 0 .. K-1, float64 [N, K], by classifiers that have seen neither the
    sample nor any other of its group.

    features: [N, D]. labels, groups: int [N]. Every class is dealt out evenly over the folds.
    """
    # imported late: scikit-learn takes a second to load, and most checks judge no labels
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classes = int(labels.max()) + 1
    heads, of_group = by_appearance(groups)
    folds = np.zeros(len(heads), np.int64)
    generator = np.random.default_rng(0)
    for label in range(classes):
        own = generator.permutation(np.flatnonzero(labels[heads] == label))
        folds[own] = np.arange(len(own)) % FOLDS
    folds = folds[of_group]
    chances = np.zeros((len(labels), classes))

    def judge(fold: int) -> None:
        test = np.flatnonzero(folds == fold)
        if len(test):
            classifier = LogisticRegression(C=_STRENGTH, max_iter=100, tol=1e-3)
            # a weight of 0 leaves a sample out without a copy of all others
            classifier.fit(features, labels, np.where(folds == fold, 0.0, 1.0))
            chances[np.ix_(test, classifier.classes_)] = classifier.predict_proba(features[test])

    # a fold a thread: the threads of BLAS would only fight with each other over such small products
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a rough answer is good enough
        judged = in_order(judge, range(FOLDS))
        list(tqdm(judged, "judging", FOLDS, unit=" folds", delay=1, disable=not progress))
    return chances


def strangeness(features: np.ndarray, *, progress: bool = True) -> np.ndarray:
    """How far each sample is from its tenth neighbour: the logarithm of the distance, in quartile
    distances above the median of all; float64 [N]."""
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=min(_NEIGHBOURS + 1, len(features))).fit(features)
    parts = range(0, len(features), _PART)
    far = [
        neighbours.kneighbors(features[start : start + _PART])[0][:, -1]
        for start in tqdm(parts, "measuring", unit=" parts", delay=1, disable=not progress)
    ]
    far = np.log(np.concatenate(far) + 1e-6)
    low, middle, high = np.quantile(far, (0.25, 0.5, 0.75))
    return (far - middle) / max(high - low, 1e-6)


def _all_features(photos: Photos, files: list[str], progress: bool) -> np.ndarray:
    """float32 [N, D]: colour, texture and flatness of each file, every block weighted as one."""

    def described(file: str) -> list[np.ndarray]:
        try:
            return describe(square(photos.load(file, _SIDE), _SIDE))
        except UnreadablePhoto:  # it was readable a moment ago
            return describe(np.zeros((_SIDE, _SIDE, 3), np.uint8))

    bar = tqdm(
        in_order(described, files), "describing", len(files), unit=" photos", disable=not progress
    )
    colour, texture, flatness = (np.stack(block) for block in zip(*bar, strict=True))
    texture, flatness = (block / (block.std(0) + 1e-6) for block in (texture, flatness))
    blocks = []
    for weight, block in zip(_WEIGHTS, (colour, texture, flatness), strict=True):
        centred = block - block.mean(0)
        spread = np.sqrt((centred**2).sum(1).mean())
        blocks.append(centred * (weight / max(spread, 1e-6)))
    return np.concatenate(blocks, axis=1)


def describe(picture: np.ndarray) -> list[np.ndarray]:
    """The colours, the texture and the flatness of a square uint8 [S, S, 3], as float32 vectors.

    Flatness: how many neighbouring pixels are (nearly) equal. Drawings and text are flat.
    """
    lab = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB)
    quarter = len(picture) // 4
    middle = np.ascontiguousarray(lab[quarter:-quarter, quarter:-quarter])
    steps = [np.abs(np.diff(picture.astype(np.int16), axis=axis)).sum(2) for axis in (0, 1)]
    flat = [(step <= most).mean() for step in steps for most in (0, 3, 8)]
    colours = np.concatenate([_colours(lab), _colours(middle)])
    texture = np.concatenate(list(_texture(lab.astype(np.float32))))
    return [colours, texture, np.array(flat, np.float32)]


def _colours(lab: np.ndarray) -> np.ndarray:
    """Square roots of the shares of Lab colours: their distance is Hellinger's. [384]."""
    ranges = [0, 256, 80, 200, 80, 220]  # of a and b what food and tables have
    counts = cv2.calcHist([lab], [0, 1, 2], None, [6, 8, 8], ranges).ravel()
    return np.sqrt(counts / (lab.shape[0] * lab.shape[1]))


def _texture(lab: np.ndarray) -> Iterator[np.ndarray]:
    """Edge strengths of each octave and channel: means in 3 x 3 parts, and their histogram."""
    for _ in range(_OCTAVES):
        for channel in cv2.split(lab):
            edges = np.log1p(np.abs(cv2.Laplacian(channel, cv2.CV_32F)))
            yield cv2.resize(edges, (3, 3), interpolation=cv2.INTER_AREA).ravel()
            counts = cv2.calcHist([edges], [0], None, [8], [0, 5]).ravel()
            yield np.sqrt(counts / edges.size)
        lab = cv2.pyrDown(lab)
