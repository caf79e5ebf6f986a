"""Mixup and CutMix in the step: pixels, exact shares of the labels, one of the two for a batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import DEVICE
from tests.test_graphs import Rerun
from tests.test_step import OPTIM, Batches, equal, micro_resnet, snapshot, steps, training
from train.graphs import CapturedStep
from train.optim import set_rate
from train.step import TrainingStep, mix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "box", [(0, 0, 0, 0), (2, 3, 9, 5), (0, 0, 12, 10), (5, 0, 12, 10), (0, 9, 1, 10)], ids=str
)
def test_the_share_of_the_labels_is_that_of_the_pixels(box, dtype):
    """Ones mixed with zeros: the mean of the pixels is the share, counted pixel by pixel."""
    ones, zeros = torch.ones(2, 3, 12, 10, dtype=dtype), torch.zeros(2, 3, 12, 10, dtype=dtype)
    top, left, bottom, right = box
    truth = np.ones((12, 10))
    truth[top:bottom, left:right] = 0
    shares = torch.tensor(box) / torch.tensor([12.0, 10.0, 12.0, 10.0]) + 0.01
    for lam in (1.0, 0.75):
        images, share = mix(ones, zeros, torch.tensor(lam), shares)
        assert images.dtype == dtype
        assert np.array_equal(images[1, 2].float(), truth * lam)
        assert share.item() == pytest.approx(truth.mean() * lam, abs=1e-7)
        assert share.item() == pytest.approx(images.double().mean().item(), abs=1e-7)
    blend, share = mix(ones, zeros, torch.tensor(0.75), None)
    assert blend.unique().tolist() == [0.75]
    assert share.item() == 0.75


def test_a_batch_has_one_of_the_two_by_equal_chance():
    def kinds(**alphas):
        run = training(seed=3, **alphas)
        return [run.mixing(8, 1 + n // 50, n % 50) for n in range(400)]

    assert kinds() == [()] * 400
    only_mixup = kinds(mixup_alpha=0.4)
    assert {len(mixing) for mixing in only_mixup} == {2}
    both, only_cutmix = kinds(mixup_alpha=0.4, cutmix_alpha=1.0), kinds(cutmix_alpha=1.0)
    cut = [n for n, (_, _, box) in enumerate(both) if box.any()]
    assert 160 < len(cut) < 240
    for n, (partner, share, box) in enumerate(both):
        same_shapes = [(t.shape, t.dtype) for t in (partner, share, box)]
        assert same_shapes == [(t.shape, t.dtype) for t in only_cutmix[n]]  # for one captured graph
        if n in cut:
            assert share == 1
            assert equal([partner, box], [only_cutmix[n][0], only_cutmix[n][2]])
        else:
            assert equal([partner, share], list(only_mixup[n]))
    assert all(share == 1 and box.tolist() != [0] * 4 for _, share, box in only_cutmix[:20])


def test_a_cutmix_step_is_that_of_the_pasted_pictures_and_shared_labels():
    """Against plain SGD on pictures pasted by numpy."""
    config = replace(
        OPTIM, momentum=0.0, nesterov=False, weight_decay=0.0, ema=0.0, label_smoothing=0.0
    )
    (batch, *_) = Batches().batches
    partner = torch.tensor([3, 0, 1, 2, 7, 4, 5, 6])
    box = torch.tensor([4, 10, 25, 32]) / 32
    lam = 1 - 21 * 22 / 32**2
    pasted = batch.images.numpy().copy()
    pasted[:, :, 4:25, 10:32] = batch.images.numpy()[partner.numpy(), :, 4:25, 10:32]

    truth = micro_resnet().train()
    logits = truth(torch.from_numpy(pasted))
    own, others = batch.labels, batch.labels[partner]
    loss = lam * F.cross_entropy(logits, own) + (1 - lam) * F.cross_entropy(logits, others)
    loss.backward()
    top = logits.argmax(1)
    correct = lam * (top == own).sum() + (1 - lam) * (top == others).sum()

    model = micro_resnet().train()
    step = TrainingStep(model, config, None)
    set_rate(step.optimizer, 0.1)
    found = step(batch.images, own, partner, torch.tensor(1.0), box)
    assert found.tolist() == pytest.approx([loss.item(), correct.item(), 0.0], rel=1e-5)
    for p, q in zip(model.parameters(), truth.parameters(), strict=True):
        assert torch.allclose(p, q - 0.1 * q.grad, atol=1e-6)


def test_a_captured_step_changes_between_the_two():
    ends = []
    for graph in (None, Rerun()):
        run = training(mixup_alpha=0.4, cutmix_alpha=1.0, seed=1)
        if graph is not None:
            run.run_step = CapturedStep(run.step, graph)
        ends.append((steps(run, Batches()), snapshot(run)))
    assert ends[0][0] == ends[1][0]
    assert equal(ends[0][1], ends[1][1])
    assert graph.replays == 6


@pytest.mark.gpu
def test_a_gpu_captures_both(exact_float32):
    losses = []
    for graph in (False, True):
        model = micro_resnet().to(DEVICE)
        options = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "seed": 1}
        run = training(model=model, cuda_graph=graph, **options)
        losses.append([step.loss for step in steps(run, Batches(device=DEVICE))])
    assert run.run_step.reason is None
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
