"""`--try` and `--fix`: a provoked fault is trained with its remedy and without it, from the same
seeds, and started again."""

import json
import shlex

import numpy as np
import pytest
from scipy.stats import ttest_rel

from train import run
from train.doctor import __main__ as command_line
from train.doctor import trial, watch
from train.doctor.effect import LOSS, compare
from train.doctor.signals import FILE, load
from train.record import read_jsonl, write_jsonl

FLAGS = (
    "--model micro_resnet --stem small --image-size 32 --limit 60 --augment none --epochs 12 "
    "--batch-size 16 --threads 1 --schedule constant --ema 0 --momentum 0 --no-nesterov "
    "--label-smoothing 0 --amp off"
)


@pytest.fixture(scope="module")
def diverging(tmp_path_factory):
    """A run whose learning rate is far too high, probed however slow the machine is."""
    folder = tmp_path_factory.mktemp("runs") / "diverging"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "ALLOWANCE", 600.0)
        assert run.main([*FLAGS.split(), "--lr", "50", "--out", str(folder)]) == 0
    return folder


def diagnosis(folder) -> dict:
    return json.loads((folder / "doctor.json").read_text())[0]


def altered(folder, tmp_path, change, **config):
    """A copy of a run's record with other settings, or without those of `change`."""
    copy = tmp_path / "copy"
    copy.mkdir()
    records = read_jsonl(folder / FILE)
    start = records[0]
    assert start["kind"] == "start"
    for group, values in config.items():
        start["config"][group].update(values)
    kept = [change(record) for record in records]
    write_jsonl(copy / FILE, filter(None, kept))
    (copy / "split.csv").write_bytes((folder / "split.csv").read_bytes())
    return copy


def test_the_remedy_of_a_rate_too_high_measurably_helps(diverging, capsys):
    assert diagnosis(diverging)["rule"] == "lr_too_high"
    assert command_line.main([str(diverging), "--try", "--epochs", "8"]) == 0
    out = capsys.readouterr().out
    assert "seeds 0 to 2" in out
    assert out.strip().endswith("3 paired seeds): the remedy helps")
    assert LOSS in out
    assert out.count("--lr find: ") == 1


def test_the_run_is_started_again_beside_the_old_one(diverging, monkeypatch):
    started = []
    monkeypatch.setattr(trial.run, "main", lambda flags: started.append(flags) or 5)
    (diverging.parent / "diverging-fixed-001").mkdir()
    assert command_line.main([str(diverging), "--fix"]) == 5
    (flags,) = started
    words = shlex.split(diagnosis(diverging)["command"])
    assert flags == [*words[3:], "--out", str(diverging.parent / "diverging-fixed-002")]
    before, after = run.parse([*FLAGS.split(), "--lr", "50"]), run.parse(flags)
    assert after.optim.lr == "find"
    assert (after.data, after.model, after.run.seed) == (before.data, before.model, 0)


def test_fix_after_try_waits_for_an_effect(diverging, monkeypatch, capsys):
    effects = [compare(LOSS, [1.0, 1.2], [1.1, 1.1]), compare(LOSS, [3.0, 3.1], [1.0, 1.0])]
    started = []
    monkeypatch.setattr(command_line, "try_remedy", lambda *_, **__: effects.pop(0))
    monkeypatch.setattr(trial.run, "main", lambda flags: started.append(flags) or 0)
    assert command_line.main([str(diverging), "--try", "--fix"]) == 0
    assert not started
    out = capsys.readouterr().out
    assert "no effect shown" in out
    assert "not started again" in out
    assert command_line.main([str(diverging), "--try", "--fix"]) == 0
    assert len(started) == 1


def test_the_effect_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    without = rng.normal(2.0, 0.3, 5)
    with_it = without - 0.4 + rng.normal(0, 0.1, 5)
    effect = compare(LOSS, without, with_it)
    low, high = ttest_rel(with_it, without).confidence_interval(0.95)
    assert (effect.low, effect.high) == pytest.approx((low, high))
    assert effect.helps
    assert not effect.harms
    accuracy = compare("validation accuracy", without, with_it)
    assert accuracy.harms
    assert "makes it worse" in accuracy.told()
    none = compare(LOSS, [1.0, 1.0], [1.0, 1.0])
    assert not none.helps
    assert not none.harms
    assert "no effect shown" in none.told()


def test_a_training_that_blows_up_counts_as_the_worst(diverging, tmp_path):
    """Both arms of a rate that ends in infinity score the same."""
    copy = altered(diverging, tmp_path, lambda r: r, optim={"lr": 1e30})
    found = [{**diagnosis(diverging), "first_step": 0}]
    found[0]["command"] = found[0]["command"].replace("--lr find", "--lr 1e29")
    effect = trial.try_remedy(copy, load(copy), found, seeds=2, epochs=1)
    assert list(effect.without) == list(effect.with_it) == [2 * np.log(5)] * 2
    assert not effect.helps


@pytest.mark.parametrize(
    ("config", "flags", "code", "words"),
    [
        ({"data": {"data": "/nowhere/photos"}}, [], 3, "/nowhere/photos"),
        ({"data": {"limit": 50}}, [], 3, "restore the data"),
        ({}, ["--seeds", "1"], 2, "at least 2"),
        ({}, ["--epochs", "0"], 2, "at least 1"),
    ],
)
def test_what_cannot_be_tried_is_said(config, flags, code, words, diverging, tmp_path, capsys):
    copy = altered(diverging, tmp_path, lambda r: r, **config)
    assert command_line.main([str(copy), "--try", *flags]) == code
    assert words in capsys.readouterr().err


def test_without_a_finding_there_is_nothing_to_try(diverging, tmp_path, capsys):
    copy = altered(diverging, tmp_path, lambda r: r if r["kind"] == "start" else None)
    for flag in ("--try", "--fix"):
        assert command_line.main([str(copy), flag]) == 2
        assert "no PROBLEM was found" in capsys.readouterr().err


def test_a_remedy_without_a_command_is_said(diverging, tmp_path, capsys):
    def spoil(record):
        if record["kind"] == "start":
            record["input"] = {"mean": [128.0] * 3, "std": [60.0] * 3, "finite": True}
        return record

    copy = altered(diverging, tmp_path, spoil)
    assert command_line.main([str(copy), "--fix"]) == 2
    assert "the remedy of input is no command" in capsys.readouterr().err


def test_a_remedy_that_changes_what_is_measured_is_not_compared(diverging):
    found = [{**diagnosis(diverging)}]
    found[0]["command"] += " --classes rendang bakso"
    with pytest.raises(trial.UsageError, match="changes what is measured"):
        trial.try_remedy(diverging, load(diverging), found)


def test_several_runs_are_not_treated_at_once(diverging, capsys):
    assert command_line.main([str(diverging), str(diverging), "--fix"]) == 2
    assert "name one folder" in capsys.readouterr().err


def test_a_rate_that_the_range_test_convicts(tmp_path, monkeypatch):
    """Slow, but not so slow that the size of the steps alone tells."""
    monkeypatch.setattr(watch, "ALLOWANCE", 600.0)
    flags = (
        "--model micro_resnet --stem small --image-size 32 --augment none --threads 1 --amp off "
        "--ema 0 --no-flips --val-scale 1 --val-crop 1 --label-smoothing 0 --schedule constant "
        "--optimizer sgd --weight-decay 0 --limit 60 --batch-size 8 --lr 1e-4 --epochs 12"
    )
    assert run.main([*flags.split(), "--out", str(tmp_path)]) == 0

    def found() -> dict:
        kept = json.loads((tmp_path / "doctor.json").read_text())
        return next(d for d in kept if d["rule"] == "lr_too_low")

    assert found()["severity"] == "note"
    assert command_line.main([str(tmp_path), "--range-test"]) == 0
    assert found()["severity"] == "problem"
    assert "range test" in found()["evidence"]
