"""The range test: what it reads from a curve, and that it leaves the training to come as it was."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from models import build_model
from tests.helpers import SGD
from train import lr_find, run
from train.data.loader import Batch
from train.errors import UsageError
from train.range_test import HIGHEST, LOWEST, STEPS, find_rate, read

FLAGS = ["--model", "micro_resnet", "--image-size", "32", "--limit", "60", "--threads", "1"]


class Photos:
    """Batches of `size` whose label is written in the picture's brightness."""

    def __init__(self, size=16):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(64) % 4
        images = torch.randn(64, 3, 16, 16, generator=generator) + labels[:, None, None, None]
        self.batches = [
            Batch(i, y, torch.arange(size))
            for i, y in zip(images.split(size), labels.split(size), strict=True)
        ]

    def epoch(self, epoch):
        yield from self.batches


def test_it_suggests_less_than_the_rate_that_destroys_and_changes_nothing():
    torch.manual_seed(0)
    model = build_model("micro_resnet", 4, stem="small", dropout=0.2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = find_rate(model, replace(SGD, lr="find"), Photos(), None)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert 1e-3 < found.suggestion < 0.3
    assert found.suggestion < found.rates[int(np.argmin(found.losses))]
    assert f"{min(found.losses):.3g}" in found.reason


@pytest.mark.parametrize("seed", range(3))
def test_small_batches_are_shown_as_many_images(seed):
    """A hundred steps of four images and no momentum saw nothing, or a rate of 3e-6."""
    torch.manual_seed(seed)
    model = build_model("micro_resnet", 4, stem="small").train()
    config = replace(SGD, lr="find", batch_size=4, momentum=0.0, nesterov=False)
    found = find_rate(model, config, Photos(4), None)
    assert 3e-4 < found.suggestion < 1
    assert len(found.rates) > 4 * STEPS


def test_it_reads_the_bottom_of_a_curve():
    rates = np.geomspace(LOWEST, HIGHEST, STEPS)
    losses = 1.6 - 0.8 * np.exp(-((np.log10(rates) + 1) ** 2))
    found = read(rates.tolist(), losses.tolist())
    assert 0.03 / 10 < found.suggestion < 0.1 / 10
    assert found.losses[found.near] <= 0.9 * 0.8 + 0.1 * 1.6 + 0.01


def test_a_long_bottom_counts_from_its_near_end():
    """A tenth of the far end, where a fraction of 0.1 % is lowest, ended two trainings of five."""
    rates = np.geomspace(LOWEST, HIGHEST, STEPS)
    losses = 0.02 + 1.4 / (1 + (rates / 0.05) ** 2) - 1e-3 * np.log10(rates)
    found = read(rates.tolist(), losses.tolist())
    assert int(np.argmin(losses)) == STEPS - 1
    assert 0.1 / 10 < found.suggestion < 0.3 / 10


@pytest.mark.parametrize("losses", [[1.6] * STEPS, list(np.linspace(1.6, 3, STEPS)), []])
def test_no_rate_is_suggested_where_none_lowers_the_loss(losses):
    rates = np.geomspace(LOWEST, HIGHEST, STEPS)[: len(losses)].tolist()
    with pytest.raises(UsageError, match="no learning rate"):
        read(rates, losses)


def test_a_run_takes_what_it_finds(tmp_path, capsys):
    flags = [*FLAGS, "--epochs", "1", "--lr", "find", "--out", str(tmp_path / "run")]
    assert run.main(flags) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert isinstance(config["optim"]["lr"], float)
    assert f"learning rate: {config['optim']['lr']:g} (" in capsys.readouterr().out
    assert (tmp_path / "run" / "lr_find.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_draws_its_curve_and_says_what_fails(tmp_path, capsys):
    assert lr_find.main([*FLAGS, "--out", str(tmp_path / "curve.png")]) == 0
    assert "learning rate: " in capsys.readouterr().out
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert lr_find.main([*FLAGS, "--init", "zeros"]) == 2
    assert "no learning rate" in capsys.readouterr().err
