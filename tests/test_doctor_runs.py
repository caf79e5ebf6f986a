"""The doctor beside real trainings of seconds: each fault is provoked in a small network, and sound
ones stay without a PROBLEM."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from models import build_model
from tests.helpers import SGD
from train import checkpoint, run
from train.config import DEFAULT, REPORT, Config, OptimConfig, to_dict
from train.data.loader import Batch
from train.doctor import watch
from train.doctor.diagnose import diagnose
from train.doctor.probe import Probe
from train.doctor.signals import load
from train.doctor.watch import Doctor
from train.loop import Listener, fit
from train.training import NonFiniteLoss, Training

SIZE, CLASSES = 16, 4
STEADY = replace(SGD, schedule="constant", lr=0.05, ema=0.0, label_smoothing=0.0, batch_size=16)


def pictures(count: int, seed: int, noise: float = 1.0, seen: int = CLASSES):
    """Pictures of a pattern a class, under noise; classes from `seen` on share one pattern."""
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(9))
    patterns = nn.functional.interpolate(patterns, size=SIZE, mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = patterns[labels.clamp(max=seen - 1)]
    return images + noise * torch.randn(images.shape, generator=generator), labels


class Photos:
    """A loader over float pictures, shuffled with the epoch."""

    def __init__(self, images, labels, batch_size, shuffle=True):
        self.images, self.labels, self.size = images, labels, batch_size
        self.shuffle = shuffle

    def __len__(self):
        return -(-len(self.labels) // self.size)

    def size_at(self, epoch):
        return 32

    def epoch(self, epoch, start=0):
        rows = torch.arange(len(self.labels))
        if self.shuffle:
            rows = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        for chunk in rows.split(self.size)[start:]:
            yield Batch(self.images[chunk], self.labels[chunk], chunk)


def micro(name="micro_resnet", **options) -> nn.Module:
    torch.manual_seed(1)
    return build_model(name, CLASSES, stem="small", **options)


def train(
    folder,
    model: nn.Module,
    optim: OptimConfig = STEADY,
    *,
    epochs: int = 10,
    data=None,
    val=None,
    mixup: float = 0.0,
    every: int | None = 10,
    watched: bool = True,
    before=lambda training: None,
):
    """Train with the doctor beside it; returns the training and what doctor.json holds."""
    folder.mkdir(exist_ok=True)
    images, labels = pictures(128, 1) if data is None else data
    val_images, val_labels = pictures(160, 2) if val is None else val
    optim = replace(optim, epochs=epochs)
    loader = Photos(images, labels, optim.batch_size)
    training = Training(
        model.train(),
        optim,
        total_steps=epochs * len(loader),
        amp_dtype=None,
        mixup_alpha=mixup,
    )
    before(training)
    config = Config(replace(DEFAULT.model, model="micro_resnet"), optim=optim)
    facts = {
        "config": to_dict(config),
        "classes": [f"class{k}" for k in range(CLASSES)],
        "train_counts": torch.bincount(labels, minlength=CLASSES).tolist(),
        "val_counts": torch.bincount(val_labels, minlength=CLASSES).tolist(),
        "twins": {"identical": 0, "alike": 0},
    }
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:64]
    batch = Batch(images[rows], labels[rows], rows)
    listeners: list[Listener] = []
    if watched:
        listeners.append(Doctor(folder, training, lambda: (batch, facts), every))
    fit(training, loader, Photos(val_images, val_labels, 80, False), CLASSES, listeners)
    return training, json.loads((folder / "doctor.json").read_text()) if watched else []


def problems(found) -> list[str]:
    return [d["rule"] for d in found if d["severity"] == "problem"]


def primary(found) -> str | None:
    return next((d["rule"] for d in found if d["primary"]), None)


# Faults


def deep(activation: type[nn.Module]) -> nn.Module:
    """34 plain convolutions without normalisation."""
    layers = []
    for number in range(34):
        width, stride = (16, 1) if number else (3, 4)
        layers += [nn.Conv2d(width, 16, 3, stride, padding=1), activation()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def drowned() -> nn.Module:
    """Every BatchNorm's bias at -10: nothing passes a ReLU."""
    model = micro("micro_plain")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, -10.0)
    return model


def frozen() -> nn.Module:
    model = micro()
    model.layer4.requires_grad_(False)
    return model


def loud() -> nn.Module:
    """A head a hundred times too large."""
    model = micro()
    with torch.no_grad():
        model.fc.weight.mul_(100)
    return model


@pytest.mark.parametrize(
    ("rule", "make", "optim"),
    [
        ("lr_too_high", micro, replace(STEADY, lr=10.0)),
        ("lr_too_low", micro, replace(STEADY, lr=1e-7)),
        ("vanishing_gradient", lambda: deep(nn.Sigmoid), STEADY),
        ("dying_relu", drowned, replace(STEADY, lr=0.01)),
        ("symmetric_init", lambda: micro(init="zeros"), STEADY),
        ("symmetric_init", lambda: micro(init="constant"), STEADY),
        ("silent_bug", frozen, STEADY),
        ("start_loss", loud, replace(STEADY, lr=1e-3)),
    ],
)
def test_a_fault_is_the_primary_finding(rule, make, optim, tmp_path):
    _, found = train(tmp_path, make(), optim, epochs=13)
    assert primary(found) == rule, [(d["rule"], d["severity"], d["evidence"]) for d in found]


def test_a_parameter_that_the_optimizer_does_not_have(tmp_path):
    def forget(training):
        group = training.step.optimizer.param_groups[0]
        group["params"] = group["params"][:-4]

    _, found = train(tmp_path, micro(), before=forget)
    assert primary(found) == "silent_bug"
    assert "not among the optimizer's" in found[0]["evidence"]


def test_overfitting_on_forty_pictures(tmp_path):
    _, found = train(
        tmp_path,
        micro(),
        replace(STEADY, weight_decay=0.0),
        epochs=24,
        data=pictures(40, 1, noise=3.0),
        val=pictures(200, 2, noise=3.0),
    )
    assert primary(found) == "overfit", found


def test_two_classes_that_look_the_same(tmp_path):
    images, labels = pictures(240, 1)
    labels = labels.clone()
    marked = labels == 3
    images[marked] = torch.randn(images[marked].shape, generator=torch.Generator().manual_seed(3))
    val_images, val_labels = pictures(200, 2)
    # on unseen pictures the class looks like all the others
    val_images[val_labels == 3] = val_images[val_labels != 3][: int((val_labels == 3).sum())]
    _, found = train(
        tmp_path, micro(), epochs=8, data=(images, labels), val=(val_images, val_labels)
    )
    assert "failing_class" in problems(found), found
    assert any("class3" in d["evidence"] for d in found)


def test_a_pixel_that_is_no_number_ends_the_run_and_is_named(tmp_path):
    images, labels = pictures(128, 1)
    images[:, 0, 3, 3] = torch.nan
    with pytest.raises(NonFiniteLoss):
        train(tmp_path, micro(), data=(images, labels))
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert primary(found) == "non_finite"
    assert "pixels" in found[0]["evidence"]
    assert "input" in problems(found)


def test_a_runaway_loss_ends_as_non_finite(tmp_path):
    with pytest.raises(NonFiniteLoss):
        train(tmp_path, deep(nn.ReLU), replace(STEADY, lr=1e12))
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert primary(found) == "non_finite"
    assert "--lr" in found[0]["command"]


# Sound trainings


@pytest.mark.parametrize(
    ("make", "optim", "options"),
    [
        (micro, replace(DEFAULT.optim, batch_size=16), {}),
        (micro, replace(SGD, batch_size=16), {"mixup": 0.4}),
        (lambda: micro("micro_plain"), REPORT.optim, {}),
        (micro, replace(STEADY, batch_size=4, lr=0.01), {"epochs": 4}),
        (micro, replace(STEADY, optimizer="adamw", lr=1e-3, schedule="cosine"), {"epochs": 20}),
        (lambda: micro(act="leaky_relu", zero_init_residual=True), STEADY, {}),
        (lambda: micro(dropout=0.3), replace(STEADY, schedule="cyclic"), {}),
    ],
)
def test_sound_trainings_have_no_problem(make, optim, options, tmp_path):
    _, found = train(tmp_path, make(), optim, **({"epochs": 10} | options))
    assert problems(found) == [], [(d["rule"], d["evidence"]) for d in found]


# It disturbs nothing


def test_the_training_is_bit_equal_with_and_without_it(tmp_path):
    ends = []
    for watched in (True, False):
        training, _ = train(
            tmp_path,
            micro(dropout=0.3),
            replace(STEADY, ema=0.9),
            epochs=3,
            mixup=0.3,
            every=1,
            watched=watched,
        )
        ends.append(([t.clone() for t in training.step.tensors()], torch.get_rng_state()))
        history = [{k: v for k, v in e.items() if "second" not in k} for e in training.history]
        ends[-1] += (history,)
    (tensors, state, history), (others, other_state, other_history) = ends
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
    assert torch.equal(state, other_state)
    assert history == other_history


def test_a_run_of_the_command_line_is_bit_equal_without_it(tmp_path):
    flags = "--model micro_resnet --image-size 32 --epochs 2 --limit 60 --dropout 0.2 --threads 1"
    ends = []
    for number, extra in enumerate(([], ["--no-doctor"])):
        out = tmp_path / str(number)
        assert run.main([*flags.split(), "--out", str(out), *extra]) == 0
        ends.append(checkpoint.load(out / "checkpoints" / "last.pt"))
        watched = not extra
        assert (out / "doctor.json").exists() == (out / "signals.jsonl").exists() == watched
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["doctor"] is not None) == watched
        assert ("None of 19 rules" in (out / "report.html").read_text()) <= watched
    for key in ("weights", "model"):
        assert all(torch.equal(v, ends[1][key][n]) for n, v in ends[0][key].items())
    assert torch.equal(ends[0]["rng"], ends[1]["rng"])


def test_a_crash_inside_it_ends_the_doctor_and_not_the_training(tmp_path, monkeypatch, capsys):
    calls = iter(range(100))

    def broken(self, step):
        if next(calls) == 1:
            raise RuntimeError("out of luck\nmore")
        return original(self, step)

    original = Probe.measure
    monkeypatch.setattr(Probe, "measure", broken)
    training, _ = train(tmp_path, micro(), epochs=3, every=2)
    assert len(training.history) == 3
    assert capsys.readouterr().out.count("doctor: failed to run: RuntimeError: out of luck") == 1
    assert load(tmp_path).others["failed"]["message"] == "RuntimeError: out of luck"


# Signals


def test_the_file_gives_back_what_the_rules_saw(tmp_path):
    _, found = train(tmp_path, micro(), epochs=3)
    signals = load(tmp_path)
    assert diagnose(signals) == found
    assert signals.steps == 24
    assert [p["step"] for p in signals.probes] == [0, 10, 20]
    assert signals.probes[0]["images"] == 64
    assert len(signals.start["layers"]) == len(signals.probes[0]["layers"]["update"])
    assert signals.start["layers"][0]["name"] == "conv1"
    assert signals.start["norm_values"] == 16 * 2 * 2  # images and the smallest map
    assert signals.epochs[-1]["confusion"] is not None


def test_the_probe_measures_what_it_says(tmp_path):
    """Norms, loss and accuracy against a plain computation on the training's own network."""
    model = micro()
    training, _ = train(tmp_path, model, epochs=1)
    images, labels = pictures(32, 5)
    probe = Probe(training, Batch(images, labels, torch.arange(32)))
    record = probe.measure(training.steps)
    with torch.no_grad():
        logits = model.eval()(images)
    loss = nn.functional.cross_entropy(logits, labels).item()
    assert record["clean_loss"] == pytest.approx(loss, rel=1e-5)
    assert record["clean_accuracy"] == (logits.argmax(1) == labels).float().mean().item()
    nn.functional.cross_entropy(model.train()(images[:16]), labels[:16]).backward()
    names = dict(model.named_modules())
    for name, gradient, weight in zip(
        probe.layers, record["layers"]["gradient"], record["layers"]["weight"], strict=True
    ):
        assert gradient == pytest.approx(names[name].weight.grad.norm().item(), rel=1e-3)
        assert weight == pytest.approx(names[name].weight.norm().item(), rel=1e-5)
    total = sum(p.grad.double().square().sum() for p in model.parameters()).sqrt().item()
    assert record["grad_norm"] == pytest.approx(total, rel=1e-3)


def test_updates_are_those_of_one_step(tmp_path):
    model = micro()
    training = Training(model.train(), STEADY, total_steps=4, amp_dtype=None)
    images, labels = pictures(16, 5)
    batch = Batch(images, labels, torch.arange(16))
    probe = Probe(training, batch)
    probe.measure(0)
    before = model.conv1.weight.detach().clone()
    assert probe.update(0) is None
    training.finish(training.train_step(batch, 1, 1))
    moved = (model.conv1.weight - before).norm() / before.norm()
    assert probe.update(1)[0] == pytest.approx(moved.item(), rel=1e-4)


def test_probes_are_stretched_to_their_budget(tmp_path, monkeypatch):
    """With an allowance of nothing the doctor takes a fiftieth of the steps' time, as counted."""
    monkeypatch.setattr(watch, "ALLOWANCE", 0.0)
    train(tmp_path, micro(), epochs=12, every=None)
    probes = load(tmp_path).probes
    assert len(probes) <= 3
    assert probes[0]["step"] == 0


def test_dead_channels_are_counted():
    model = micro("micro_plain")
    with torch.no_grad():
        model.layer2[0].bn1.bias[:8] = -50.0
    training = Training(model.train(), STEADY, total_steps=4, amp_dtype=None)
    images, labels = pictures(16, 5)
    record = Probe(training, Batch(images, labels, torch.arange(16))).measure(0)
    assert record["units"]["layer2.0.bn1"]["dead"] == 8 / 32
    assert record["units"]["bn1"]["dead"] == 0
    assert np.isfinite(record["units"]["bn1"]["shift"])
