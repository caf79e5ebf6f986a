"""The training step against a loop written out in plain PyTorch, and what a bad step leaves."""

import io
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

from models import build_model
from tests.helpers import DEVICE, SGD
from train import loop
from train.config import OptimConfig
from train.data.augment import mixup
from train.data.loader import Batch
from train.loop import finished_steps, train_epoch
from train.optim import set_rate
from train.step import TrainingStep
from train.training import NonFiniteLoss, Training

STEPS = 6
CLASSES = 5
# a learning rate that AdamW and SGD both take, and batches of two sizes
OPTIM = replace(SGD, lr=0.01, epochs=1, ema=0.9)


def micro_resnet() -> torch.nn.Module:
    torch.manual_seed(3)
    return build_model("micro_resnet", CLASSES)


class Batches:
    """A loader of random pictures: `sizes` of them in each batch."""

    def __init__(self, sizes=(8,) * STEPS, bad=(), device="cpu"):
        generator = torch.Generator().manual_seed(1)
        self.batches, first = [], 0
        for number, size in enumerate(sizes, start=1):
            images = torch.randn(size, 3, 32, 32, generator=generator)
            if number in bad:
                images[1, 0, 5, 5] = torch.nan
            labels = torch.randint(CLASSES, (size,), generator=generator)
            batch = Batch(images, labels, torch.arange(first, first + size))
            self.batches.append(Batch(*(tensor.to(device) for tensor in batch)))
            first += size

    def __len__(self):
        return len(self.batches)

    def size_at(self, epoch):
        return 32

    def epoch(self, epoch, start=0):
        yield from self.batches[start:]


def training(config: OptimConfig = OPTIM, total=STEPS, **options) -> Training:
    options = {"amp_dtype": None} | options
    model = options.pop("model", None) or micro_resnet()
    return Training(model.train(), config, total_steps=total, **options)


def steps(training: Training, batches: Batches, epoch: int = 1) -> list[loop.Step]:
    return list(finished_steps(training, batches, epoch))


def snapshot(training: Training) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in training.step.tensors()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def plain_loop(batches: Batches, config: OptimConfig, mixup_alpha: float, seed: int):
    """The truth: everything with PyTorch's unfused optimizers and its own schedulers."""
    model = micro_resnet().train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=config.lr, foreach=False)
    else:
        optimizer = torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, foreach=False
        )
    total = len(batches)
    schedule = {
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, total),
        "step": lambda: lr_scheduler.MultiStepLR(optimizer, [4, 5]),
        "onecycle": lambda: lr_scheduler.OneCycleLR(
            optimizer, config.lr, total_steps=total, cycle_momentum=False
        ),
        "cyclic": lambda: lr_scheduler.CyclicLR(
            optimizer, config.lr / 10, config.lr, step_size_up=1, cycle_momentum=False
        ),
    }[config.schedule]()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    outcomes = []
    for number, (images, labels, _) in enumerate(batches.epoch(1), start=1):
        others = labels
        lam = 1.0
        if mixup_alpha:
            lam, partner = mixup(len(labels), mixup_alpha, seed=seed, epoch=1, batch=number)
            lam = round(256 * lam) / 256
            images = lam * images + (1 - lam) * images[partner]
            others = labels[partner]
        logits = model(images)
        smooth = config.label_smoothing
        loss = lam * F.cross_entropy(logits, labels, label_smoothing=smooth)
        loss = loss + (1 - lam) * F.cross_entropy(logits, others, label_smoothing=smooth)
        optimizer.zero_grad()
        loss.backward()
        if config.clip_grad:
            norm = sum(p.grad.double().square().sum() for p in model.parameters()).sqrt().item()
            for p in model.parameters():
                p.grad *= min(1.0, config.clip_grad / norm)
        optimizer.step()
        schedule.step()
        decay = min(config.ema, (1 + number) / (10 + number))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                average[name] = decay * average[name] + (1 - decay) * value
            else:
                average[name] = value.clone()
        top = logits.argmax(1)
        right = lam * (top == labels).sum() + (1 - lam) * (top == others).sum()
        outcomes.append((loss.item(), right.item()))
    return model.state_dict(), average, outcomes


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "onecycle", "cyclic"])
@pytest.mark.parametrize(
    ("optimizer", "smoothing", "clip", "alpha"),
    [("sgd", 0.1, 0.0, 0.0), ("sgd", 0.0, 0.5, 0.4), ("adamw", 0.1, 0.5, 0.4)],
)
def test_six_steps_are_those_of_a_plain_loop(optimizer, smoothing, clip, alpha, schedule):
    config = replace(
        OPTIM, optimizer=optimizer, label_smoothing=smoothing, clip_grad=clip, schedule=schedule
    )
    batches = Batches((8, 8, 8, 5, 8, 8))
    weights, average, outcomes = plain_loop(batches, config, alpha, seed=4)
    ours = training(config, mixup_alpha=alpha, seed=4)
    found = steps(ours, batches)
    assert [(s.number, s.images) for s in found] == [*enumerate((8, 8, 8, 5, 8, 8), start=1)]
    assert [s.loss for s in found] == pytest.approx([loss for loss, _ in outcomes], rel=1e-4)
    assert [s.correct for s in found] == pytest.approx([right for _, right in outcomes])
    assert not any(s.skipped for s in found)
    start = dict(micro_resnet().state_dict())
    for state, truth in ((ours.model.state_dict(), weights), (ours.weights(), average)):
        for name, value in truth.items():
            moved = (value - start[name]).double().norm()
            away = (state[name] - value).double().norm()
            assert away <= 2e-3 * moved + 1e-6, name


def test_clipping_bounds_what_the_optimizer_sees():
    config = replace(OPTIM, momentum=0.0, nesterov=False, weight_decay=0.0, clip_grad=0.01)
    run = training(replace(config, schedule="constant"))
    before = [p.detach().clone() for p in run.model.parameters()]
    steps(run, Batches((8,)))
    moved = [(p - b).double() for p, b in zip(run.model.parameters(), before, strict=True)]
    length = sum(m.square().sum() for m in moved).sqrt().item()
    assert length == pytest.approx(config.lr * config.clip_grad, rel=1e-3)


@pytest.mark.parametrize("loss", ["ce", "weighted_ce", "focal"])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_parts_of_a_batch_add_up_to_the_batch(loss, alpha):
    """No norm over the batch here: nothing else tells the parts from the whole."""
    ends = []
    for accumulate in (1, 3):
        torch.manual_seed(3)
        model = build_model("micro_resnet", CLASSES, norm="group").double()
        config = replace(OPTIM, loss=loss, accumulate=accumulate, clip_grad=1.0)
        options = {"mixup_alpha": alpha, "class_counts": (1, 2, 3, 4, 5)}
        run = training(config, model=model, **options)
        batches = Batches((8, 7, 3, 2))  # the last two are too few for three parts
        batches.batches = [Batch(b.images.double(), *b[1:]) for b in batches.batches]
        ends.append((steps(run, batches), model.state_dict()))
    for whole, parts in zip(*(seen for seen, _ in ends), strict=True):
        assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
        assert parts.correct == pytest.approx(whole.correct)
    for name, value in ends[0][1].items():  # the loss is computed in float32
        torch.testing.assert_close(ends[1][1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_batch_norm_sees_one_part_at_a_time():
    run, sizes = training(replace(OPTIM, accumulate=3)), []
    run.model.bn1.register_forward_hook(lambda module, inputs, _: sizes.append(len(inputs[0])))
    steps(run, Batches((8,)))
    assert sizes == [3, 3, 2]
    assert run.model.bn1.num_batches_tracked == 3
    sizes.clear()
    steps(run, Batches((4, 3)))  # the last of an epoch: no part has a single image
    assert sizes == [2, 2, 3]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_bad_loss_changes_nothing_and_names_its_rows(optimizer):
    config = replace(OPTIM, optimizer=optimizer, clip_grad=1.0)
    run = training(config, mixup_alpha=0.2)
    batches = Batches((4, 4, 4, 4), bad=(3,))
    seen = finished_steps(run, batches, 2)
    for _ in range(2):
        next(seen)
    before = snapshot(run)
    with pytest.raises(NonFiniteLoss, match="epoch 2, step 3") as caught:
        next(seen)
    assert caught.value.indices == [8, 9, 10, 11]
    assert equal(snapshot(run), before)
    assert all(tensor.isfinite().all() for tensor in before)
    assert all(p.grad is None for p in run.model.parameters())


def test_after_a_bad_step_it_goes_on_as_if_it_had_not_been():
    """The step itself knows no patience: two more steps are those of a run without the bad one."""
    ends = []
    for bad in ((2,), ()):
        model = micro_resnet().train()
        step = TrainingStep(model, OPTIM, None)
        set_rate(step.optimizer, 0.05)
        batches = Batches((4, 4, 4, 4), bad=(2,)).batches
        for number, batch in enumerate(batches, start=1):
            step.average.prepare(number)
            if number != 2 or bad:
                outcome = step(batch.images, batch.labels)
                assert outcome[2].item() == (number == 2)
        ends.append([tensor.clone() for tensor in step.tensors()])
    assert equal(*ends)


def test_an_infinite_loss_with_finite_gradients_is_skipped():
    """Logits so far apart that the loss overflows: softmax minus one-hot is still finite."""

    class Apart(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)) * 0 + torch.tensor([3e38, -3e38])

    model = Apart(3 * 32 * 32, 2)
    step = TrainingStep(model, replace(OPTIM, label_smoothing=0.0), None)
    set_rate(step.optimizer, 0.1)
    before = [tensor.clone() for tensor in step.tensors()]
    step.average.prepare(1)
    loss, _, skipped = step(Batches().batches[0].images, torch.ones(8, dtype=torch.int64)).tolist()
    assert (loss, skipped) == (math.inf, 1.0)
    assert equal(step.tensors(), before)


def overflow(model: torch.nn.Module, when: set[int]) -> None:
    """Make the last layer's gradient infinite in the backward passes numbered `when`, from 1."""
    calls = iter(range(1, 1000))
    model.fc.weight.register_hook(lambda g: g * math.inf if next(calls) in when else g)


def test_float16_skips_overflown_gradients_and_goes_on():
    run = training(replace(OPTIM, clip_grad=1.0), amp_dtype=torch.float16)
    overflow(run.model, {2, 3, 4, 5})
    seen, states = [], [snapshot(run)]
    for step in finished_steps(run, Batches(), 1):
        seen.append(step.skipped)
        states.append(snapshot(run))
    assert seen == [False, True, True, True, True, False]
    scale = len(states[0]) - 2  # the last two tensors are the scale and its growth
    assert equal(states[1][:scale], states[5][:scale])
    assert not equal(states[5][:scale], states[6][:scale])
    assert [state[scale].item() for state in states] == [
        2.0**e for e in (14, 14, 13, 12, 11, 10, 10)
    ]
    assert all(tensor.isfinite().all() for tensor in states[6])


def test_float16_stops_after_three_bad_losses_in_a_row():
    run = training(amp_dtype=torch.float16)
    record = train_epoch(run, Batches(bad=(2, 3)), 1, [])
    assert record["skipped_steps"] == 2
    assert math.isfinite(record["train_loss"])
    assert all(b.isfinite().all() for b in run.model.buffers())  # of the forward passes with NaN
    run = training(amp_dtype=torch.float16, total=12)
    train_epoch(run, Batches(bad=(5, 6)), 1, [])
    with pytest.raises(NonFiniteLoss, match="epoch 1, step 5") as caught:  # it began an epoch ago
        train_epoch(run, Batches(bad=(1,)), 2, [])
    assert caught.value.indices == [*range(32, 40)]


def test_scaled_float16_steps_are_close_to_float32():
    ends = []
    for dtype in (None, torch.float16):
        run = training(replace(OPTIM, lr=1e-3), amp_dtype=dtype)
        ends.append([step.loss for step in steps(run, Batches())])
    assert ends[1] == pytest.approx(ends[0], rel=2e-2)


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_restored_training_continues_bit_for_bit(optimizer, dtype):
    config = replace(OPTIM, optimizer=optimizer, schedule="cosine")
    whole = training(config, total=12, amp_dtype=dtype, mixup_alpha=0.3)
    steps(whole, Batches())
    file = io.BytesIO()
    torch.save(whole.state(), file)
    kept = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    steps(whole, Batches(), 2)
    other = build_model("micro_resnet", CLASSES)
    parts = training(config, total=12, amp_dtype=dtype, mixup_alpha=0.3, model=other)
    parts.restore(kept)
    assert parts.steps == 6
    steps(parts, Batches(), 2)
    assert equal(snapshot(whole), snapshot(parts))


def test_everything_a_step_changes_is_among_its_tensors():
    """What is not on the list would survive a capture's warm-up, and a bad step, changed."""
    run = training(replace(OPTIM, optimizer="adamw"), amp_dtype=torch.float16)
    listed = {tensor.data_ptr() for tensor in run.step.tensors()}
    state = run.state()
    for values in (state["model"], state["weights"], *state["optimizer"].values()):
        assert {value.data_ptr() for value in values.values()} <= listed
    before = snapshot(run)
    steps(run, Batches())
    changed = [not torch.equal(a, b) for a, b in zip(before, run.step.tensors(), strict=True)]
    assert sum(changed) >= len(changed) - 1  # the scale itself moves after 2000 steps


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_device_is_never_waited_for(optimizer):
    config = replace(OPTIM, optimizer=optimizer, clip_grad=1.0)
    model = micro_resnet().to(DEVICE)
    run = training(config, model=model, mixup_alpha=0.2, amp_dtype=torch.float16)
    batches = Batches(device=DEVICE).batches
    run.finish(run.train_step(batches[0], 1, 1))  # libraries load
    torch.cuda.set_sync_debug_mode("error")
    try:
        underway = [run.train_step(batch, 1, n) for n, batch in enumerate(batches[1:4], start=2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(run.finish(step).loss) for step in underway)
