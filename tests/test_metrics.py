"""Scores against scikit-learn and against intervals and temperatures known beforehand."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import (
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
)

from train import metrics


@pytest.fixture
def drawn():
    """300 predictions that are often right: logits [300, 4] and labels."""
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 4, 300)
    logits = generator.normal(size=(300, 4)) + 1.5 * np.eye(4)[labels]
    return logits, labels


def test_scores_are_those_of_scikit_learn(drawn):
    logits, labels = drawn
    probability = metrics.probabilities(logits)
    np.testing.assert_allclose(probability, softmax(logits, axis=1), rtol=1e-12)
    found, predicted = metrics.score(probability, labels), probability.argmax(axis=1)
    assert found.accuracy == (predicted == labels).mean()
    assert found.loss == pytest.approx(log_loss(labels, probability))
    assert found.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    np.testing.assert_array_equal(found.confusion, confusion_matrix(labels, predicted))
    expected = np.array(precision_recall_fscore_support(labels, predicted)).T
    ours = [(one.precision, one.recall, one.f1, one.images) for one in found.per_class]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    for k, one in enumerate(found.per_class):
        assert one.auc == pytest.approx(roc_auc_score(labels == k, probability[:, k]))
        assert one.auc_interval[0] < one.auc < one.auc_interval[1]


def test_what_does_not_exist_is_none():
    probability = np.array([[0.9, 0.1, 0.0], [0.8, 0.1, 0.1]])
    found = metrics.score(probability, np.array([0, 0]))
    assert [one.auc for one in found.per_class] == [None, None, None]
    assert found.per_class[1].recall is None
    assert found.per_class[1].precision is None
    assert found.per_class[1].f1 is None
    assert found.macro_f1 == pytest.approx(1 / 3)
    assert metrics.as_json(found, ["a", "b", "c"])["per_class"]["a"]["recall"] == 1.0


def test_wilson_interval_is_the_published_one():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20
    assert metrics.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert metrics.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_auc_interval_covers_as_often_as_it_says():
    """Scores from two normal distributions, whose area is known: Phi(d / sqrt(2))."""
    generator, truth, hits = np.random.default_rng(3), 0.8413447, 0
    for _ in range(400):
        positive, negative = generator.normal(np.sqrt(2), size=40), generator.normal(size=60)
        auc = (positive[:, None] > negative).mean()
        low, high = metrics.auc_interval(float(auc), 40, 60)
        hits += low <= truth <= high
    assert 0.91 <= hits / 400 <= 0.985


def test_f1_interval_covers_as_often_as_it_says():
    """Photos of two classes, of which each network names three quarters right: F1 is 3 / 4."""
    generator, hits = np.random.default_rng(5), 0
    for _ in range(400):
        labels = generator.integers(0, 2, size=80)
        named = np.where(generator.random(80) < 0.75, labels, 1 - labels)
        low, high = metrics.score(np.eye(2)[named], labels).per_class[0].f1_interval
        hits += low <= 0.75 <= high
    assert 0.92 <= hits / 400 <= 0.985


def test_intervals_count_pictures_and_not_their_copies(drawn):
    probability, labels = metrics.probabilities(drawn[0]), drawn[1]
    once = metrics.score(probability, labels)
    copies = [np.concatenate([part] * 5) for part in (probability, labels, np.arange(len(labels)))]
    assert metrics.score(*copies).accuracy_interval == pytest.approx(once.accuracy_interval)
    for one, five in zip(once.per_class, metrics.score(*copies).per_class, strict=True):
        for name in ("precision", "recall", "f1", "auc"):
            interval = f"{name}_interval"
            assert getattr(five, interval) == pytest.approx(getattr(one, interval)), name
    blind = metrics.score(*copies[:2]).per_class[0]
    assert np.ptp(blind.recall_interval) < np.ptp(once.per_class[0].recall_interval)


def test_counts_alone_say_the_same_without_intervals(drawn):
    found = metrics.score(metrics.probabilities(drawn[0]), drawn[1])
    for one, counted in zip(found.per_class, metrics.count_scores(found.confusion), strict=True):
        assert (counted.images, counted.precision, counted.recall, counted.f1) == (
            one.images,
            one.precision,
            one.recall,
            one.f1,
        )
        assert counted.auc is counted.f1_interval is None


def test_temperature_of_overconfident_logits_is_found(drawn):
    generator = np.random.default_rng(1)
    logits = 2 * generator.normal(size=(20_000, 5))
    labels = np.array([generator.choice(5, p=row) for row in metrics.probabilities(logits)])
    assert metrics.fit_temperature(logits, labels) == pytest.approx(1.0, abs=0.04)
    assert metrics.fit_temperature(3 * logits, labels) == pytest.approx(3.0, abs=0.12)


def test_a_perfect_validation_does_not_make_it_infinitely_sure():
    logits = np.array([[4.0, 0.0], [0.0, 3.0], [5.0, 1.0], [0.5, 4.0]] * 5)
    temperature = metrics.fit_temperature(logits, logits.argmax(axis=1))
    sure = metrics.probabilities(logits, temperature).max(axis=1).mean()
    assert sure == pytest.approx(21 / 22, abs=0.01)


def test_calibration_bins_hold_confidence_and_accuracy():
    # ten predictions at 0.72, seven right; four at 0.95, all right
    confidence = np.array([0.72] * 10 + [0.95] * 4)
    probability = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.array([0] * 7 + [1] * 3 + [0] * 4)
    found = metrics.score(probability, labels)
    assert [(b.images, round(b.confidence, 2), b.accuracy) for b in found.calibration] == [
        (10, 0.72, 0.7),
        (4, 0.95, 1.0),
    ]
    assert found.calibration_error == pytest.approx((10 * 0.02 + 4 * 0.05) / 14)
