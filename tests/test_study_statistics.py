"""Intervals, tests and measurements of the study against scipy, scikit-learn and hand counts."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import nn

from models import build_model
from train.metrics import wilson
from train.study.comparing import reference_of, verdict
from train.study.measure import block_measures, count_flops
from train.study.plots import pareto
from train.study.reasons import gradient_reach, identity_distance
from train.study.statistics import (
    Mean,
    bootstrap_weights,
    class_intervals,
    holm,
    mcnemar,
    percentile_interval,
    t_mean,
    weighted_auc,
    weighted_mean,
)

RNG = np.random.default_rng(7)


def test_t_interval_is_scipys_and_the_correction_widens_it():
    values = [0.04, 0.11, 0.06, 0.13, 0.02]
    truth = stats.ttest_1samp(values, 0)
    plain = t_mean(values)
    assert (plain.low, plain.high) == pytest.approx(tuple(truth.confidence_interval()))
    assert plain.p == pytest.approx(truth.pvalue)
    # 1/5 + 1/4 is 2.25 times 1/5: half the interval grows by 1.5
    wide = t_mean(values, overlap=0.25)
    assert wide.high - wide.value == pytest.approx(1.5 * (plain.high - plain.value))
    assert wide.p == pytest.approx(2 * stats.t.sf(truth.statistic / 1.5, 4))


def test_one_run_has_no_interval():
    assert t_mean([0.3], overlap=0.25) == Mean(0.3, None, None, None, 1)
    same = t_mean([0.1, 0.1])
    assert (same.low, same.high, same.p) == (0.1, 0.1, None)


def test_mcnemar_by_hand():
    assert mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, None, 0.03]) == [0.03, 0.06, None, 0.06]
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_weighted_auc_is_scikit_learns_with_ties():
    scores = RNG.integers(0, 6, 40) / 5
    positive = RNG.random(40) < 0.4
    weights = RNG.integers(0, 4, (8, 40))
    expected = [roc_auc_score(positive, scores, sample_weight=row) for row in weights]
    assert weighted_auc(scores, positive, weights) == pytest.approx(expected)
    assert np.isnan(weighted_auc(scores, np.zeros(40, bool), weights)).all()


def test_the_bootstrap_draws_whole_pictures():
    clusters = np.array(["b", "a", "b", "c"])
    weights = bootstrap_weights(clusters)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert weights.mean() == pytest.approx(1, abs=0.1)


def test_copies_of_a_picture_count_once():
    """Each photo twice changes nothing; taken for different pictures the interval shrinks."""
    right, pictures = RNG.random(300) < 0.4, np.arange(300)
    once = percentile_interval(weighted_mean(right, bootstrap_weights(pictures)))
    half = 1.96 * np.sqrt(0.24 / 300)
    assert once == pytest.approx((right.mean() - half, right.mean() + half), abs=0.012)
    twice, both = np.tile(right, 2), np.tile(pictures, 2)
    assert percentile_interval(weighted_mean(twice, bootstrap_weights(both))) == once
    low, high = percentile_interval(weighted_mean(twice, bootstrap_weights(np.arange(600))))
    assert high - low < 0.8 * (once[1] - once[0])


def test_class_intervals():
    """Precision and recall by Wilson over different pictures; area and F1 hold their estimates."""
    labels = np.tile(np.repeat([0, 1, 2], 20), 2)
    pictures, runs = np.tile(np.arange(60), 2), np.repeat([0, 1], 60)
    probability = RNG.dirichlet(np.ones(3), 120)
    probability[:, 2] = 0  # a class that is never named
    probability[np.arange(120), labels] += 0.2 * (labels < 2)
    found = class_intervals(probability, labels, pictures, runs)
    predicted = probability.argmax(axis=1)
    recall = float((predicted == 0)[labels == 0].mean())
    assert found[0]["recall"] == pytest.approx(wilson(recall * 20, 20))
    assert found[2]["precision"] is None
    assert found[2]["recall"] == wilson(0, 20)
    areas = [roc_auc_score(labels[:60] == 0, probability[runs == r, 0]) for r in (0, 1)]
    low, high = found[0]["auc"]
    assert low < np.mean(areas) < high


def test_verdicts():
    def of(value, p, low, high):
        mean = Mean(value, value - 0.1, value + 0.1, p, 3)
        photos = {"mean": value, "low": low, "high": high}
        return verdict({"best_val_accuracy": mean, "photos": photos}, p)

    assert of(0.05, 0.01, 0.01, 0.09) == "better"
    assert of(-0.05, 0.01, -0.09, -0.01) == "worse"
    assert of(0.05, 0.2, 0.01, 0.09) == of(0.05, None, 0.01, 0.09) == "ahead"
    assert of(-0.05, 0.2, -0.09, -0.01) == "behind"
    assert of(0.05, 0.2, -0.01, 0.09) == "none"
    assert verdict({}, None) == "unknown"


def test_what_a_model_is_compared_with():
    models = ["plain34", "resnet34", "resnet34+se", "resnet34+se+preact", "resnet18"]
    found = {model: reference_of(model, models) for model in models}
    assert found == {
        "plain34": None,
        "resnet34": "plain34",
        "resnet34+se": "resnet34",
        "resnet34+se+preact": "resnet34+se",
        "resnet18": "plain34",
    }


def test_pareto_front():
    points = {
        "cheap": {"accuracy": 0.5, "cost": 1},
        "dear": {"accuracy": 0.7, "cost": 3},
        "bad": {"accuracy": 0.6, "cost": 4},
        "beaten": {"accuracy": 0.4, "cost": 1},
    }
    assert pareto(points, "cost") == ["cheap", "dear"]


def test_flops_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(128, 5))
    expected = 2 * (8 * 4 * 4 * 27 + 128 * 5)
    assert count_flops(model, 8, torch.device("cpu")) == expected


def test_blocks_that_do_nothing_are_at_the_identity():
    """Zero-initialised residual blocks are identities; gradients are those of autograd."""
    torch.manual_seed(1)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    model = build_model("micro_resnet", 3, zero_init_residual=True)
    _, blocks = block_measures(model, images, labels)
    assert [block["name"] for block in blocks] == [
        "conv1",
        *(f"layer{stage}.0" for stage in (1, 2, 3, 4)),
    ]
    assert [block["identity_distance"] for block in blocks] == [None, 0, None, None, None]
    model = build_model("micro_plain", 3)
    loss, blocks = block_measures(model, images, labels)
    own = nn.functional.cross_entropy(model(images), labels)
    assert loss == pytest.approx(own.item(), rel=1e-5)
    block = model.layer2[0]
    gradients = torch.autograd.grad(own, [block.conv1.weight, block.conv2.weight])
    expected = sum(g.square().sum() for g in gradients).sqrt().item()
    assert blocks[2]["gradient_norm"] == pytest.approx(expected, rel=1e-3)
    assert blocks[1]["identity_distance"] > 0.1


def test_reach_of_gradients_and_distance_from_identity():
    norms = {"conv1": 9.0, "layer1.0": 1.0, "layer1.1": 4.0, "layer2.0": 7.0, "layer4.0": 8.0}
    blocks = [
        {"name": name, "gradient_norm": norm, "identity_distance": None}
        for name, norm in norms.items()
    ]
    assert gradient_reach({"blocks": blocks}) == pytest.approx(np.log(2 / 8))
    assert identity_distance({"blocks": blocks}) is None
    blocks[1]["identity_distance"], blocks[2]["identity_distance"] = 0.2, 0.6
    assert identity_distance({"blocks": blocks}) == pytest.approx(0.4)
