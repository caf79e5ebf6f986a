"""The questions of a course on failing trainings, asked through the command line: each situation is
provoked, named as the primary finding, and its remedy measurably helps under `--try`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from train import run
from train.doctor import __main__ as command_line
from train.doctor import watch
from train.record import read_json

CLASSES = 4
FLAGS = [
    "--stem",
    "small",
    "--image-size",
    "32",
    "--val-scale",
    "1",
    "--val-crop",
    "1",
    "--no-flips",
    "--augment",
    "none",
    "--optimizer",
    "sgd",
    "--weight-decay",
    "5e-4",
    "--schedule",
    "constant",
    "--ema",
    "0",
    "--label-smoothing",
    "0",
    "--batch-size",
    "16",
    "--threads",
    "1",
    "--amp",
    "off",
]


def photos(folder: Path, train, val: int, *, noise: float = 1.0) -> list[str]:
    """Photos of a pattern a class under noise, `train` (one number a class) to train on and `val`
    of each to validate. Returns the flags that take them."""
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(9))
    patterns = nn.functional.interpolate(patterns, size=32, mode="bilinear").numpy()
    rng = np.random.default_rng(1)
    (folder / "train").mkdir(parents=True)
    rows = ["filename,label,split"]
    for label, count in enumerate(train):
        for number in range(count + val):
            picture = patterns[label] + noise * rng.standard_normal((3, 32, 32))
            pixels = (128 + 40 * picture).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
            name = f"{label}-{number}.png"
            Image.fromarray(pixels).save(folder / "train" / name)
            rows.append(f"{name},class{label},{'train' if number < count else 'val'}")
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    return ["--data", str(folder)]


def sigmoids() -> nn.Module:
    """34 plain convolutions with sigmoids and no norms."""
    layers: list[nn.Module] = []
    for number in range(34):
        width, stride = (16, 1) if number else (3, 4)
        layers += [nn.Conv2d(width, 16, 3, stride, padding=1), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def drown(model: nn.Module) -> nn.Module:
    """The biases of all norms far below zero: no ReLU lets anything through."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, -10.0)
    return model


def plain_is_sigmoids(build):
    def built(config, *arguments):
        return sigmoids() if config.model.model == "micro_plain" else build(config, *arguments)

    return built


def norms_are_drowned(build):
    return lambda *arguments: drown(build(*arguments))


EVEN = [30] * CLASSES


@pytest.mark.parametrize(
    ("rule", "flags", "data", "fault"),
    [
        ("vanishing_gradient", "--model micro_plain --lr 0.05 --epochs 14", {}, plain_is_sigmoids),
        (
            "dying_relu",
            "--model micro_plain --optimizer adamw --lr 2e-3 --epochs 14",
            {},
            norms_are_drowned,
        ),
        (
            "bn_small_batch",
            "--model micro_plain --stem imagenet --batch-size 2 --lr 0.02 --epochs 8",
            {},
            None,
        ),
        ("lr_too_low", "--model micro_resnet --lr 1e-7 --epochs 14", {}, None),
        ("symmetric_init", "--model micro_resnet --init zeros --lr 0.05 --epochs 14", {}, None),
        (
            "failing_class",
            "--model micro_resnet --lr 0.01 --epochs 10",
            {"train": [60, 60, 60, 3]},
            None,
        ),
        (
            "overfit",
            "--model micro_resnet --lr 0.05 --weight-decay 0 --epochs 24",
            {"train": [10] * CLASSES, "val": 40, "noise": 3.0},
            None,
        ),
    ],
)
def test_a_situation_is_named_and_its_remedy_helps(
    rule, flags, data, fault, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(watch, "ALLOWANCE", 600.0)  # probed however slow the machine is
    if fault is not None:
        monkeypatch.setattr(run, "build", fault(run.build))
    source = photos(tmp_path / "photos", **{"train": EVEN, "val": 25} | data)
    folder = tmp_path / "run"
    assert run.main([*FLAGS, *flags.split(), *source, "--out", str(folder)]) == 0
    found = read_json(folder / "doctor.json")
    assert found, "nothing was found"
    assert found[0]["rule"] == rule, found
    assert found[0]["primary"]
    assert found[0]["effect"] is None
    capsys.readouterr()
    assert command_line.main([str(folder), "--try", "--seeds", "5"]) == 0
    assert capsys.readouterr().out.strip().endswith("5 paired seeds): the remedy helps")
    effect = read_json(folder / "doctor.json")[0]["effect"]
    assert effect["text"] in (folder / "report.html").read_text()
