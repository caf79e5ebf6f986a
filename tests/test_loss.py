"""The losses of `--loss` against their formulas."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models import build_model
from tests.helpers import SGD
from train.data.loader import Batch
from train.step import TrainingStep, class_weights
from train.training import Training


def step_with(loss: str, counts=(80, 15, 5), smoothing: float = 0.0) -> TrainingStep:
    config = replace(SGD, loss=loss, label_smoothing=smoothing)
    model = torch.nn.Linear(4, len(counts))
    return TrainingStep(model, config, None, class_weights=class_weights(counts))


def drawn():
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(50, 3, generator=generator)
    return logits, torch.randint(3, (50,), generator=generator)


def test_weighted_cross_entropy_counts_every_class_alike():
    logits, labels = drawn()
    share = {0: 100 / (3 * 80), 1: 100 / (3 * 15), 2: 100 / (3 * 5)}
    each = -logits.double().log_softmax(1)[torch.arange(50), labels]
    weights = torch.tensor([share[k] for k in labels.tolist()], dtype=torch.float64)
    expected = (weights * each).sum() / weights.sum()
    assert step_with("weighted_ce").loss(logits, labels).item() == pytest.approx(expected.item())
    assert class_weights([4, 0]).tolist() == [0.5, 0.0]


def test_focal_loss_is_that_of_its_paper():
    logits, labels = drawn()
    named = logits.double().softmax(1)[torch.arange(50), labels]
    expected = (-((1 - named) ** 2) * named.log()).mean()
    assert step_with("focal").loss(logits, labels).item() == pytest.approx(expected.item())


def test_cross_entropy_takes_no_notice_of_the_counts():
    logits, labels = drawn()
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.equal(step_with("ce", smoothing=0.1).loss(logits, labels), expected)


@pytest.mark.parametrize("loss", ["weighted_ce", "focal"])
def test_they_train_under_mixup(loss):
    torch.manual_seed(0)
    model = build_model("micro_resnet", 3, stem="small").train()
    config = replace(SGD, loss=loss, schedule="constant", lr=0.05)
    training = Training(
        model, config, total_steps=12, amp_dtype=None, mixup_alpha=0.2, class_counts=(8, 6, 2)
    )
    labels = torch.tensor([0] * 8 + [1] * 6 + [2] * 2)
    images = torch.randn(16, 3, 16, 16) + labels[:, None, None, None]
    batch = Batch(images, labels, torch.arange(16))
    losses = [training.finish(training.train_step(batch, 1, n)).loss for n in range(1, 13)]
    assert losses[-1] < 0.6 * losses[0]
