"""Every rule on recorded signals: one record that provokes it, and sound ones on which all of them
stay silent. The remedies' commands, the explanations and the command line."""

import copy
import dataclasses
import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from models import build_model
from train import run
from train.config import DEFAULT, RECIPES, Config, from_dict, to_dict
from train.data.loader import Batch
from train.doctor import __main__ as command_line
from train.doctor.diagnose import diagnose
from train.doctor.measures import auc, flat, learnt, run_of, share_error
from train.doctor.remedy import command_of, command_with
from train.doctor.request import compare_depth, learn_by_heart
from train.doctor.rules import RULES
from train.doctor.section import add_findings
from train.doctor.signals import FILE, SignalLog, Signals, load
from train.metrics import auc_interval
from train.page import Page

IDS = {rule.id for rule in RULES}
CLASSES = 5
LAYERS = 16
PER_EPOCH = 20


def record(epochs: int = 20, **changes) -> list[dict]:
    """The records of a sound run on 5 x 100 photos: it learns, and generalises."""
    rng = np.random.default_rng(0)
    config = to_dict(replace(DEFAULT, model=replace(DEFAULT.model, model="resnet34")))
    names = [f"layer{i}" for i in range(LAYERS)]
    start = {
        "kind": "start",
        "step": 0,
        "config": config,
        "classes": [f"dish{k}" for k in range(CLASSES)],
        "train_counts": [128] * CLASSES,
        "val_counts": [40] * CLASSES,
        "twins": {"identical": 0, "alike": 0},
        "first_step": 0,
        "steps_per_epoch": PER_EPOCH,
        "total_steps": epochs * PER_EPOCH,
        "epochs": epochs,
        "batch_size": 32,
        "norm_images": 32,
        "processes": 1,
        "amp": "bfloat16",
        "layers": [
            {
                "name": name,
                "kind": "conv",
                "kernel": [3, 3],
                "padding": [1, 1],
                "in": [64, 8, 8],
                "out": [64, 8, 8],
                "shortcut": True,
            }
            for name in names
        ],
        "frozen": [],
        "not_optimised": [],
        "parameters": {f"{name}.weight": 1000 for name in names},
        "input": {"mean": [0.1, 0.0, -0.1], "std": [1.0, 0.9, 1.1], "finite": True},
        "probe_labels": [i % CLASSES for i in range(64)],
        **changes,
    }
    records = [start]
    for epoch in range(epochs + 1):
        step, share = epoch * PER_EPOCH, epoch / epochs
        accuracy = 0.2 + 0.65 * math.sqrt(share)
        if epoch:
            loss = 1.75 * (1 - share) + 0.5 * share + 0.05 * rng.standard_normal(PER_EPOCH)
            records.append(
                {
                    "kind": "steps",
                    "step": step,
                    "loss": loss.tolist(),
                    "accuracy": (accuracy + 0.05 * rng.standard_normal(PER_EPOCH)).tolist(),
                    "learning_rate": [0.03] * PER_EPOCH,
                    "skipped": [0.0] * PER_EPOCH,
                }
            )
        records.append(
            {
                "kind": "probe",
                "step": step,
                "epoch": max(1, epoch),
                "images": 64,
                "clean_loss": 1.6 - 1.2 * share,
                "clean_accuracy": accuracy,
                "confidence": [0.2 + 0.6 * share] * 64,
                "loss": 1.6 - 1.1 * share,
                "grad_norm": 2.0,
                "scale": None,
                "layers": {
                    "gradient": [0.5] * LAYERS,
                    "weight": [5.0] * LAYERS,
                    "filter_variance": [0.9] * LAYERS,
                    "output": [1.0] * LAYERS,
                    "update": [1e-3] * LAYERS,
                },
                "units": {f"act{i}": {"dead": 0.0, "zero": 0.5, "channels": 64} for i in range(8)},
                "no_gradient": [],
                "still": {},
            }
        )
        if epoch:
            confusion = np.full((CLASSES, CLASSES), 2) + 32 * np.eye(CLASSES, dtype=int)
            records.append(
                {
                    "kind": "epoch",
                    "step": step,
                    "epoch": epoch,
                    "train_loss": float(loss.mean()),
                    "train_accuracy": accuracy,
                    "val_loss": 1.6 - 0.9 * share,
                    "val_accuracy": accuracy - 0.04,
                    "val_images": 40 * CLASSES,
                    "auc": [0.9] * CLASSES,
                    "confusion": confusion.tolist(),
                    "trained_in_eval": False,
                    "evaluated_in_train": False,
                }
            )
    return records


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [r for r in records if r["kind"] == kind]


def set_all(kind: str, **values) -> Callable[[list[dict]], None]:
    def change(records):
        for one in of_kind(records, kind):
            one.update(copy.deepcopy(values))

    return change


def set_layers(**values) -> Callable[[list[dict]], None]:
    def change(records):
        for one in of_kind(records, "probe"):
            one["layers"].update(copy.deepcopy(values))

    return change


def learns_nothing(records: list[dict]) -> None:
    """A loss at ln K, and accuracies of chance."""
    rng = np.random.default_rng(1)
    for one in of_kind(records, "steps"):
        one["loss"] = (1.62 + 0.02 * rng.standard_normal(PER_EPOCH)).tolist()
        one["accuracy"] = [0.2] * PER_EPOCH
    for one in of_kind(records, "probe"):
        one.update(loss=1.62, clean_loss=1.62, clean_accuracy=0.2)
    for one in of_kind(records, "epoch"):
        loss = 1.62 + 0.005 * rng.standard_normal()
        one.update(train_loss=loss, train_accuracy=0.2, val_accuracy=0.2, val_loss=1.62)


def start_of(records: list[dict]) -> dict:
    return records[0]


def no_number(records):
    of_kind(records, "steps")[3]["loss"][4] = None


def overflowing(records):
    start_of(records)["amp"] = "float16"
    of_kind(records, "steps")[10]["skipped"][3:7] = [1.0] * 4


def copied(records):
    start_of(records)["twins"] = {"identical": 3, "alike": 5}


def loud_start(records):
    of_kind(records, "probe")[0]["loss"] = 40.0
    of_kind(records, "steps")[0]["loss"][:8] = [30.0] * 8


def knows_already(records):
    of_kind(records, "probe")[0]["loss"] = 0.1
    of_kind(records, "steps")[0]["loss"][:8] = [0.1] * 8


def frozen(records):
    names = [f"layer{i}.weight" for i in range(8)]
    start_of(records)["frozen"] = names
    for probe in of_kind(records, "probe"):
        probe["still"] = dict.fromkeys(names, probe["step"])


def detached(records):
    for probe in of_kind(records, "probe"):
        probe["no_gradient"] = ["layer3.weight"]
        probe["still"] = {"layer3.weight": probe["step"]}


def too_fast(records):
    learns_nothing(records)
    set_layers(update=[0.4] * LAYERS)(records)


def exploding(records):
    for probe in of_kind(records, "probe")[-3:]:
        probe["grad_norm"] = 300.0
    of_kind(records, "steps")[-1]["loss"] = np.geomspace(1, 50, PER_EPOCH).tolist()


def vanishing(records):
    learns_nothing(records)
    set_layers(gradient=np.geomspace(1e-7, 0.5, LAYERS).tolist())(records)


def memorised_on_top(records):
    """98 % on training, 62 % on validation, and early layers that do not learn."""
    set_layers(gradient=np.geomspace(1e-6, 0.5, LAYERS).tolist())(records)
    for probe in of_kind(records, "probe"):
        probe["clean_accuracy"] = 0.98
    for epoch in of_kind(records, "epoch"):
        epoch.update(train_accuracy=0.98, val_accuracy=0.62)


def dying(records):
    learns_nothing(records)
    for probe in of_kind(records, "probe")[2:]:
        probe["units"]["act3"]["dead"] = 0.8


def noisy_norms(records):
    start_of(records).update(batch_size=2, norm_images=2)
    start_of(records)["config"]["optim"]["batch_size"] = 2
    for probe in of_kind(records, "probe"):
        probe.update(batch_accuracy=probe["clean_accuracy"] + 0.2, disagree=13)


def leaning_on_companions(records):
    """Known in the batches of training, with the statistics of two images, and with no others;
    the noise has killed units as well."""
    dying(records)
    start_of(records).update(batch_size=2, norm_images=2)
    for one in of_kind(records, "steps"):
        one["accuracy"] = [0.6] * PER_EPOCH
    for probe in of_kind(records, "probe"):
        probe.update(clean_accuracy=0.35, batch_accuracy=0.35, disagree=6)


def two_values(records, known=0.5):
    """BatchNorm of two images whose map has become one pixel: known no better in training than in
    use, so that this alone tells."""
    start_of(records).update(batch_size=2, norm_images=2, norm_values=2)
    for one in of_kind(records, "steps"):
        one["accuracy"] = [known] * PER_EPOCH
    for probe in of_kind(records, "probe"):
        probe.update(clean_accuracy=known, batch_accuracy=known, disagree=0)


def two_values_and_known(records):
    two_values(records, 0.95)


def too_slow(records):
    learns_nothing(records)
    set_layers(update=[1e-7] * LAYERS)(records)


def no_room(records):
    rng = np.random.default_rng(2)
    for one in of_kind(records, "probe"):
        one.update(clean_accuracy=0.5, clean_loss=1.05)
    for one in of_kind(records, "epoch"):
        loss = 1.2 + 0.004 * rng.standard_normal()
        one.update(train_loss=loss, train_accuracy=0.5, val_accuracy=0.49)


def one_class(records):
    for one in of_kind(records, "epoch"):
        one["auc"] = [0.9, 0.55, 0.9, 0.88, 0.91]
        one["confusion"][1] = [12, 2, 10, 8, 8]


def never_named(records):
    """Ranked well, but seldom shown and taken for the others."""
    start_of(records)["train_counts"][1] = 20
    for one in of_kind(records, "epoch"):
        one["auc"] = [0.95] * 5
        one["confusion"] = (36 * np.eye(5, dtype=int) + 1).tolist()
        one["confusion"][1] = [37, 1, 1, 1, 0]


def by_heart(records):
    for one in of_kind(records, "probe"):
        one["clean_accuracy"] = 0.98
    for number, one in enumerate(of_kind(records, "epoch")):
        one.update(train_accuracy=0.98, val_accuracy=0.65, val_loss=1.0 + 0.1 * number)


def vanished_map(records):
    learns_nothing(records)
    start_of(records)["layers"][-1]["out"] = [64, 1, 1]


def cannot_learn(records):
    kind = {"kind": "one_batch", "images": 16, "steps": 200, "accuracy": 0.3}
    records.append({**kind, "loss": 1.5, "first_loss": 1.6})


def plain_is_worse(records):
    start_of(records)["config"]["model"]["model"] = "plain34"
    pairs = {"plain": [1.6, 1.58, 1.61], "residual": [1.48, 1.5, 1.49]}
    records.append({"kind": "degradation", **pairs, "residual_model": "resnet34"})


PROVOKED = [
    ("non_finite", no_number),
    ("non_finite", overflowing),
    ("non_finite", lambda r: r.append({"kind": "stop", "step": 400, "rows": [1]})),
    ("input", lambda r: start_of(r)["input"].update(mean=[120.0] * 3, std=[60.0] * 3)),
    ("input", lambda r: start_of(r)["input"].update(finite=False)),
    ("input", lambda r: start_of(r)["input"].update(std=[0.001] * 3)),
    ("leakage", copied),
    ("start_loss", loud_start),
    ("start_loss", knows_already),
    ("symmetric_init", set_layers(filter_variance=[0.0] * LAYERS)),
    ("silent_bug", frozen),
    ("silent_bug", detached),
    ("silent_bug", set_all("epoch", trained_in_eval=True)),
    ("silent_bug", set_all("epoch", evaluated_in_train=True)),
    ("one_batch", cannot_learn),
    ("lr_too_high", too_fast),
    ("exploding_gradient", exploding),
    ("vanishing_gradient", vanishing),
    ("vanishing_gradient", memorised_on_top),
    ("degradation", plain_is_worse),
    ("dying_relu", dying),
    ("bn_small_batch", noisy_norms),
    ("bn_small_batch", leaning_on_companions),
    ("bn_small_batch", two_values),
    ("lr_too_low", too_slow),
    ("stagnation", learns_nothing),
    ("underfit", no_room),
    ("failing_class", one_class),
    ("failing_class", never_named),
    ("overfit", by_heart),
    ("geometry", vanished_map),
]


@pytest.mark.parametrize(("rule", "change"), PROVOKED)
def test_a_rule_is_provoked_and_primary(rule, change):
    records = record()
    change(records)
    found = diagnose(Signals(records))
    rules = {d["rule"]: d for d in found if d["severity"] == "problem"}
    assert rule in rules, found
    assert rules[rule]["primary"], found
    assert rules[rule]["evidence"]
    assert rules[rule]["remedy"]
    assert sum(d["primary"] for d in found) == 1


def test_every_rule_is_provoked():
    assert {rule for rule, _ in PROVOKED} == IDS
    assert len(RULES) == len(IDS) == 19


def cold_spike(records):
    of_kind(records, "epoch")[0].update(val_loss=9.0, val_accuracy=0.2)


def end_of_decay(records):
    """Everything stands still, because the rate has decayed to nothing."""
    for number, one in enumerate(of_kind(records, "steps")):
        one["learning_rate"] = [0.03 * max(0.0, 1 - number / 12)] * PER_EPOCH
    for epoch in of_kind(records, "epoch")[12:]:
        epoch["train_loss"] = 1.3
    for probe in of_kind(records, "probe")[12:]:
        probe["layers"]["update"] = [1e-8] * LAYERS
        probe["clean_loss"], probe["clean_accuracy"] = 1.2, 0.6


def sparse(records):
    for probe in of_kind(records, "probe"):
        for unit in probe["units"].values():
            unit.update(zero=0.85, dead=0.03)


def dark(records):
    start_of(records)["input"].update(mean=[-1.6, -1.5, -1.4], std=[0.3] * 3)


def mixed(records):
    """Mixup keeps the training loss high and the accuracy low."""
    for one in of_kind(records, "epoch"):
        one["train_loss"] = 1.3 + 0.01 * (one["epoch"] % 3)
        one["train_accuracy"] = 0.5


def rare_but_learnt(records):
    start_of(records).update(train_counts=[600, 10, 10, 10, 10], val_counts=[180, 5, 5, 5, 5])
    for one in of_kind(records, "epoch"):
        one["auc"] = [0.9, 0.72, 0.8, 0.85, 0.9]


def tiny_validation(records):
    for one in of_kind(records, "epoch"):
        one.update(train_accuracy=0.96, val_accuracy=0.78, val_images=9)


def head_at_zero(records):
    for probe in of_kind(records, "probe"):
        probe["layers"]["filter_variance"][-1] = 0.0


def accepted(records):
    copied(records)
    start_of(records)["config"]["data"]["accept_leak"] = True


def balanced(records):
    """A rare class's accuracy is no chance level where every class is shown equally often."""
    start_of(records)["config"]["data"]["sampler"] = "balanced"
    start_of(records)["train_counts"] = [600, 10, 10, 10, 10]


def few_rare_photos(records):
    one_class(records)
    start_of(records)["val_counts"] = [40, 8, 40, 40, 40]


def averaged_in_small_batches(records):
    """Batches of eight that learn; what is evaluated is the average over the latest 200 steps."""
    start_of(records).update(batch_size=8, norm_images=8)
    assert start_of(records)["config"]["optim"]["ema"] == 0.995
    probes = of_kind(records, "probe")
    then = [probe["clean_accuracy"] for probe in probes]
    for number, probe in enumerate(probes):
        late = then[max(0, number - 200 // PER_EPOCH)]
        probe.update(clean_accuracy=late, batch_accuracy=late, disagree=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: None,
        averaged_in_small_batches,
        two_values_and_known,
        cold_spike,
        end_of_decay,
        sparse,
        dark,
        mixed,
        rare_but_learnt,
        tiny_validation,
        head_at_zero,
        few_rare_photos,
        accepted,
        balanced,
        set_all("epoch", val_accuracy=None, val_loss=None, auc=None),
        lambda r: r[:] and r.__delitem__(slice(8, None)),
        lambda r: r.__delitem__(slice(1, None)),
        set_layers(update=None),
    ],
)
def test_a_sound_record_has_no_problem(change):
    records = record()
    change(records)
    signals = Signals(records)
    problems = [d for d in diagnose(signals) if d["severity"] == "problem"]
    assert problems == []


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_no_record_of_a_prefix_is_a_problem(amp):
    """A sound run is judged while it goes on: at no moment does it look ill, and no rule fails."""
    records = record(amp=amp)
    for probe in of_kind(records, "probe"):
        probe["scale"] = 2.0**14 if amp == "float16" else None
    signals = Signals()
    for one in records:
        signals.add(one)
        found = diagnose(signals, live=True)
        assert [d for d in found if d["severity"] == "problem"] == []


def test_the_cause_comes_before_its_consequences():
    records = record()
    too_fast(records)
    dying(records)
    found = diagnose(Signals(records))
    assert [d["rule"] for d in found][:3] == ["lr_too_high", "dying_relu", "stagnation"]
    assert [d["primary"] for d in found][:3] == [True, False, False]


def test_a_loss_that_overflows_in_eval_mode_is_a_silent_bug():
    records = record()
    set_all("epoch", trained_in_eval=True)(records)
    no_number(records)
    found = diagnose(Signals(records))
    assert [d["rule"] for d in found][:2] == ["silent_bug", "non_finite"]


def test_live_leaves_out_what_needs_a_training():
    records = record()
    cannot_learn(records)
    assert diagnose(Signals(records), live=True) == []
    assert len(diagnose(Signals(records))) == 1


def test_a_class_that_fails_for_want_of_photos_gets_its_cause():
    records = record()
    one_class(records)
    start_of(records)["train_counts"] = [150, 5, 150, 150, 150]
    (found,) = diagnose(Signals(records))
    assert "5 training photos" in found["evidence"]
    assert "--sampler balanced" in found["command"]
    records = record()
    one_class(records)
    for epoch in of_kind(records, "epoch"):
        epoch["confusion"][1] = [2, 2, 34, 1, 1]
    (found,) = diagnose(Signals(records))
    assert "dish2" in found["evidence"]
    assert "relabel" in found["remedy"]


# Remedies


@pytest.mark.parametrize(("rule", "change"), PROVOKED)
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_remedys_command_parses_and_changes_the_run(rule, change, recipe):
    records = record()
    start_of(records)["config"] = to_dict(RECIPES[recipe])
    start_of(records)["config"]["model"]["init"] = "xavier"
    change(records)
    for found in diagnose(Signals(records)):
        if found["command"] is None:
            continue
        words = shlex.split(found["command"])
        assert words[:3] == ["python", "-m", "train.run"]
        parsed = run.parse(words[3:])
        assert parsed != from_dict(start_of(records)["config"])


def test_a_command_is_the_configuration_it_was_made_of():
    config = Config(
        model=replace(DEFAULT.model, model="plain18", zero_init_residual=False, dropout=0.25),
        data=replace(DEFAULT.data, data="my photos/a b", classes=("x", "-y z"), limit=12),
        optim=replace(DEFAULT.optim, nesterov=False, lr=3e-05, clip_grad=1.0),
        run=replace(DEFAULT.run, fused=True, seed=7, deterministic=True, doctor=False, threads=2),
    )
    config = replace(config, data=replace(config.data, classes=("x", "y z")))
    assert run.parse(shlex.split(command_of(config))[3:]) == config
    for recipe in RECIPES.values():
        assert run.parse(shlex.split(command_of(recipe))[3:]) == recipe
    report = to_dict(RECIPES["report"])
    assert "--lr 0.5" in command_with(report, {"lr": 0.5})
    assert command_with(report, {}) is None
    with pytest.raises(KeyError, match="no_such_flag"):
        command_with(report, {"no_such_flag": 1})


# Explanations


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_an_explanation_is_whole_in_both_languages(rule):
    assert set(rule.texts) == {"en", "id"}
    assert rule.sources
    for text in rule.texts.values():
        values = dataclasses.asdict(text)
        assert all(len(value) > 20 for name, value in values.items() if name != "title")
    assert rule.texts["en"].what != rule.texts["id"].what
    flags = {
        f"--{f.name}".replace("_", "-")
        for g in dataclasses.fields(Config)
        for f in dataclasses.fields(g.default_factory)
    }
    flags |= {"--one-batch", "--range-test", "--explain"}
    for text in rule.texts.values():
        for value in dataclasses.asdict(text).values():
            named = {w.strip(".,;:()`") for w in value.split() if w.strip("(`").startswith("--")}
            assert named <= flags, named - flags


@pytest.mark.parametrize(
    ("rule", "language", "words"),
    [
        (
            "vanishing_gradient",
            "en",
            [
                "98 %",
                "62",
                "sigmoid",
                "LeakyReLU",
                "He ",
                "resnet34",
                "BatchNorm",
                "Group",
                "Dropout",
            ],
        ),
        ("vanishing_gradient", "id", ["98 %", "62", "sigmoid", "LeakyReLU", "BatchNorm"]),
        ("bn_small_batch", "en", ["generalise", "Group", "Layer", "Dropout"]),
        ("stagnation", "en", ["too high", "too low", "zeros", "too small", "yclic", "omentum"]),
        (
            "stagnation",
            "id",
            ["terlalu tinggi", "terlalu rendah", "nol", "terlalu kecil", "omentum"],
        ),
        ("dying_relu", "en", ["0 for every", "gradient", "capacity", "leaky_relu"]),
        ("failing_class", "en", ["0.55", "0.85", "imbalance", "Class weights", "majority"]),
        ("failing_class", "id", ["0,55", "0,85", "Bobot kelas", "mayoritas"]),
        (
            "overfit",
            "en",
            [
                "98 %",
                "65 %",
                "85 %",
                "three design errors",
                "shortcuts",
                "dropout",
                "strides",
                "weight-decay",
            ],
        ),
        ("overfit", "id", ["98 %", "65 %", "tiga kesalahan desain", "shortcut", "stride"]),
    ],
)
def test_the_courses_questions_are_answered(rule, language, words, capsys):
    assert command_line.main(["--explain", rule, "--language", language]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert [word for word in words if word not in text] == []


# Measures


def test_auc_is_that_of_scikit_learn():
    rng = np.random.default_rng(3)
    for _ in range(20):
        positive = rng.random(50) < 0.3
        scores = np.round(rng.random(50) + 0.3 * positive, 1)  # with ties
        assert auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    assert auc(np.ones(4), np.zeros(4, bool)) is None


def test_auc_interval_covers_what_it_says():
    """95 % of the intervals around measured areas hold the true one, 0.76 for one deviation."""
    rng, inside = np.random.default_rng(4), 0
    positive = np.arange(150) < 50
    for _ in range(400):
        scores = rng.standard_normal(150) + positive
        low, high = auc_interval(auc(scores, positive), 50, 100)
        inside += low <= 0.7602 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_small_measures():
    assert run_of([True, False, True, True], 2) == 2
    assert run_of([True, True, False], 1) is None
    assert flat([1.0, 1.01, 0.99, 1.0, 1.01, 1.0])
    assert not flat([1.0, 0.97, 0.94, 0.91, 0.88, 0.85])
    assert not flat([1.0, 0.995, 0.99, 0.985, 0.98, 0.975])  # slow, but beyond doubt
    assert 0 < share_error(1.0, 20) < share_error(0.5, 20)
    records = record()
    assert learnt(Signals(records))
    learns_nothing(records)
    assert not learnt(Signals(records))


# Trainings on request


@pytest.mark.parametrize(
    ("update", "suggestion", "severity"),
    [
        (5e-5, None, "note"),
        (5e-5, 0.3, "problem"),
        (5e-5, 0.29, None),
        (1e-7, None, "problem"),
        (1e-7, 0.1, None),
        (2e-4, 1.0, None),
    ],
)
def test_the_range_test_decides_whether_a_rate_is_too_low(update, suggestion, severity):
    """The run's is 0.03."""
    records = record()
    learns_nothing(records)
    set_layers(update=[update] * LAYERS)(records)
    if suggestion is not None:
        records.append({"kind": "range_test", "suggestion": suggestion})
    found = [d for d in diagnose(Signals(records)) if d["rule"] == "lr_too_low"]
    assert [d["severity"] for d in found] == ([severity] if severity else [])
    if suggestion is not None and found:
        assert "the range test finds 0.3, 10 times" in found[0]["evidence"]


def pictures() -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 4
    return Batch(torch.randn(16, 3, 16, 16, generator=generator), labels, torch.arange(16))


@pytest.mark.parametrize(("rate", "sound"), [(0.05, True), (0.0, False)])
def test_one_batch_is_learnt_by_heart_or_not(rate, sound):
    torch.manual_seed(0)
    model = build_model("micro_resnet", 4, stem="small")
    tried = learn_by_heart(model, replace(DEFAULT.optim, lr=rate), pictures())
    signals = Signals([record()[0], tried])
    assert [d["rule"] for d in diagnose(signals)] == ([] if sound else ["one_batch"])


def test_plain_and_residual_runs_are_compared():
    runs = {}
    for model, height in (("plain34", 0.2), ("resnet34", 0.0)):
        for seed in range(3):
            records = record()
            start = start_of(records)
            start["config"]["model"]["model"] = model
            start["config"]["run"]["seed"] = seed
            of_kind(records, "epoch")[-1]["train_loss"] = 1.4 + height + 0.01 * seed
            runs[f"{model}-{seed}"] = Signals(records)
    compare_depth(runs)
    for name, signals in runs.items():
        found = [d["rule"] for d in diagnose(signals) if d["severity"] == "problem"]
        assert found == (["degradation"] if "plain" in name else []), name


# Files and the command line


def test_a_resumed_log_drops_what_came_after_its_checkpoint(tmp_path):
    log = SignalLog(tmp_path)
    for one in record(3):
        log.write(one)
    with open(tmp_path / FILE, "ab") as stream:
        stream.write(b'{"kind": "steps", "st')  # torn by a crash
    again = SignalLog(tmp_path, 2 * PER_EPOCH)
    assert again.signals.steps == 2 * PER_EPOCH
    assert [p["step"] for p in load(tmp_path).probes] == [0, PER_EPOCH, 2 * PER_EPOCH]
    again.write(record(3)[-1])
    assert len(load(tmp_path).epochs) == 3


@pytest.fixture
def folder(tmp_path):
    records = record()
    by_heart(records)
    log = SignalLog(tmp_path)
    for one in records:
        log.write(one)
    return tmp_path


def test_a_folder_is_judged_again(folder, capsys):
    page = folder / "doctor.html"
    assert command_line.main([str(folder), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "primary PROBLEM: overfit" in out
    found = json.loads((folder / "doctor.json").read_text())
    assert set(found[0]) == {
        "rule",
        "severity",
        "primary",
        "first_step",
        "evidence",
        "explanation",
        "remedy",
        "command",
        "effect",
    }
    html = page.read_text()
    assert "data:image/png" in html
    assert "Overfitting" in html


def test_what_cannot_be_judged_is_said_in_one_sentence(tmp_path, capsys):
    for words, sentence in (
        ([str(tmp_path)], "holds no signals.jsonl"),
        (["--explain", "measles"], "choose one of silent_bug, non_finite, input"),
        ([], "name a run folder"),
    ):
        assert command_line.main(words) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("rule", "change"), PROVOKED)
def test_every_finding_can_be_shown(rule, change):
    records = record()
    change(records)
    start_of(records)["classes"][1] = "<img onerror=alert(1)> $x$"
    signals = Signals(records)
    page = Page("Doctor")
    add_findings(page, signals, diagnose(signals))
    assert "<img onerror" not in page.html()
