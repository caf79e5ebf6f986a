"""The running statistics of averaged weights: those of their own activations."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from models import build_model
from tests.test_step import OPTIM, Batches, equal, training
from tests.test_weight_copies import CLASSES, Small, run_of, tiny
from train import checkpoint, precise_bn
from train import run as run_job
from train.config import Config, DataConfig, OptimConfig, from_dict
from train.data.augment import MEAN, STD
from train.inputs import Inputs, evaluated, load_inputs
from train.loop import evaluating, fit
from train.predictor import network
from train.training import Training

CLEAN = (6, 6, 6)


def expected(model: nn.Module, batches) -> dict[str, torch.Tensor]:
    """The truth: mean and unbiased variance of what each norm is given in a copy of `model` that
    trains, batch by batch, averaged."""
    model = copy.deepcopy(model).train()
    found: dict[str, list] = {}
    names = {norm: name for name, norm in model.named_modules() if isinstance(norm, nn.BatchNorm2d)}

    def look(norm, inputs):
        values = inputs[0].double().transpose(0, 1).flatten(1)
        found.setdefault(names[norm], []).append(torch.stack([values.mean(1), values.var(1)]))

    for norm in names:
        norm.register_forward_pre_hook(look)
    with torch.no_grad():
        for batch in batches.epoch(0):
            model(batch.images)
    means = {name: torch.stack(values).mean(0) for name, values in found.items()}
    return {
        f"{name}.{buffer}": values[row]
        for name, values in means.items()
        for row, buffer in enumerate(("running_mean", "running_var"))
    }


def statistics(run: Training) -> dict[str, torch.Tensor]:
    return {name: value for name, value in run.average.state.items() if "running" in name}


def close(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], rtol=1e-4):
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(found[name].double(), value, rtol=rtol, atol=rtol)


def test_the_average_gets_the_statistics_of_its_own_activations():
    run, clean = training(mixup_alpha=0.4), Batches(CLEAN)
    fit(run, Batches(), None, CLASSES, [])
    stale = {name: value.clone() for name, value in statistics(run).items()}
    with evaluating(run) as model:
        truth = expected(model, clean)
        precise_bn.measure(run, model, clean)
    close(statistics(run), truth)
    with pytest.raises(AssertionError):  # what the average of the running ones is not
        close(stale, truth, rtol=1e-2)


@pytest.mark.parametrize("backend", ["eager", "compile", "triton"])
def test_backends_agree(backend):
    run, clean = run_of(model=tiny(backend), fused=False, amp_dtype=None), Small(CLEAN)
    with evaluating(run) as model:
        truth = expected(tiny(), clean)
        precise_bn.measure(run, model, clean)
    close(statistics(run), truth)


def test_training_takes_no_notice():
    """What it goes on with is the same, and so are the norms' settings."""
    ends = []
    for clean in (None, Batches(CLEAN)):
        run = training(replace(OPTIM, epochs=2))
        fit(run, Batches(), Batches((4,)), CLASSES, [], norm_loader=clean)
        ends.append([*run.model.state_dict().values(), *run.step.parameters])
        norms = [m for m in run.model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {norm.momentum for norm in norms} == {0.1}
        run.begin(3, 32)
        assert all(norm.training for norm in norms)
    assert equal(*ends)
    assert run.history[0]["val_loss"] is not None


def test_what_is_validated_is_what_is_saved():
    run, clean, shown = training(), Batches(CLEAN), Batches((4,))
    fit(run, Batches(), shown, CLASSES, [], norm_loader=clean)
    model = build_model("micro_resnet", CLASSES)
    model.load_state_dict(run.state()["weights"])
    with torch.no_grad():
        logits = model.eval()(shown.batches[0].images)
    loss = nn.functional.cross_entropy(logits.double(), shown.batches[0].labels)
    assert loss.item() == pytest.approx(run.history[-1]["val_loss"], rel=1e-6)
    with evaluating(run) as model:
        close(statistics(run), expected(model, clean))


def test_frozen_layers_keep_theirs():
    run = training(replace(OPTIM, freeze_epochs=1))
    before = {name: value.clone() for name, value in statistics(run).items()}
    fit(run, Batches(), None, CLASSES, [], norm_loader=Batches(CLEAN))
    assert equal(list(before.values()), list(statistics(run).values()))


def test_other_norms_have_none():
    model = build_model("micro_resnet", CLASSES, norm="group")
    run = training(model=model)
    fit(run, Batches(), None, CLASSES, [], norm_loader=Batches(CLEAN))
    assert not statistics(run)


@pytest.mark.parametrize(
    ("photos", "val_batch", "sizes"),
    [
        (1000, 64, [64] * 4),
        (1000, 100, [100, 100]),
        (1000, 600, [600]),
        (70, 64, [64]),
        (9, 1, [2] * 4),
    ],
)
def test_training_photos_measure_as_validation_sees_them(photos, val_batch, sizes):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (photos + 5, 37, 37, 3), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, photos + 5)
    train = rng.permutation(photos + 5)[:photos]
    inputs = Inputs(images, SimpleNamespace(labels=labels), SimpleNamespace(train=train))
    data = DataConfig(image_size=32, val_scale=1.0)
    config = Config(data=data, optim=OptimConfig(val_batch_size=val_batch))
    batches = list(
        precise_bn.make_loader(inputs, config, torch.float32, torch.device("cpu")).epoch(0)
    )
    assert [len(batch.indices) for batch in batches] == sizes
    rows = np.concatenate([batch.indices.numpy() for batch in batches])
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(train)
    first = torch.from_numpy(evaluated(images[rows[0]], data)).permute(2, 0, 1) / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(batches[0].images[0], (first - mean) / std, atol=1e-5, rtol=1e-5)


def test_a_run_ends_with_them(tmp_path, monkeypatch):
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "cache"))
    words = ["--model", "micro_resnet", "--image-size", "32", "--epochs", "1", "--limit", "60"]
    words += ["--batch-size", "8", "--amp", "off", "--val-fraction", "0", "--no-doctor"]
    assert run_job.main([*words, "--out", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    state = checkpoint.load(path)
    config = from_dict(state["config"], path)
    loader = precise_bn.make_loader(load_inputs(config), config, torch.float32, torch.device("cpu"))
    model = network(config, len(state["classes"]), state["weights"], path)
    truth = expected(model, loader)
    close({name: state["weights"][name] for name in truth}, truth)
