"""The largest batch that fits: measured, pretended limits, and a run that starts as without it."""

from dataclasses import replace

import pytest
import torch

from models import Backend
from tests.helpers import SGD
from tests.test_run import QUICK, main, photos, read  # noqa: F401  a fixture
from train import auto_batch, checkpoint, run
from train.auto_batch import Memory, chosen, group_rooms, measured
from train.config import DEFAULT
from train.errors import OutOfMemoryError, UsageError
from train.inputs import load_inputs

CPU = torch.device("cpu")
MEMORY = Memory(fixed=100e6, image=1e6)


def with_flag(optim):
    return replace(DEFAULT, optim=optim, run=replace(DEFAULT.run, auto_batch=True))


@pytest.mark.parametrize(
    ("optim", "count", "free", "batch", "parts", "lr", "words"),
    [
        (DEFAULT.optim, 10_000, 400e6, 296, 1, 3.04e-3, "296 instead of 32 (it fits: 1.0 MB"),
        (SGD, 10_000, 228e6, 128, 1, 0.12, "from 0.03 to 0.12, with the batch (SGD)"),
        (DEFAULT.optim, 350, 9e9, 40, 1, 1.12e-3, "8,900 would fit, but an epoch keeps 8 steps"),
        (DEFAULT.optim, 100, 9e9, 32, 1, 1e-3, "the learning rate stays"),
        (DEFAULT.optim, 10_000, 113e6, 32, 3, 1e-3, "32 in 3 parts, since 13 fit"),
        (replace(SGD, lr="find"), 10_000, 400e6, 296, 1, "find", "is looked for with it"),
    ],
)
def test_what_is_chosen_and_why(optim, count, free, batch, parts, lr, words):
    config, reason = chosen(with_flag(optim), count, MEMORY, free)
    assert (config.optim.batch_size, config.optim.accumulate) == (batch, parts)
    assert config.optim.lr == lr
    assert words in reason
    assert not config.run.auto_batch  # it is resolved: nobody chooses anew
    rest = replace(config.optim, batch_size=32, accumulate=1, lr=optim.lr)
    assert rest == replace(optim, batch_size=32)


def test_batch_normalisation_needs_two_images():
    with pytest.raises(OutOfMemoryError, match=r"not even 2 images fit .* lower --image-size"):
        chosen(with_flag(SGD), 100, MEMORY, 101.5e6)


def test_sizes_grow_until_the_next_would_not_fit():
    tried = []

    def trial(batch: int) -> float:
        tried.append(batch)
        return MEMORY.fixed + MEMORY.image * batch

    every = auto_batch.sizes(torch.device("cuda"), 1000)
    assert list(every) == [4, 8, 16, 32, 64, 128, 256, 512]
    memory = measured(trial, every, 200e6)
    assert tried == [4, 8, 16, 32, 64]  # 128 would take 228 MB
    assert memory == MEMORY
    assert memory.images(200e6) == 100


def test_a_trial_that_runs_out_of_memory_ends_the_search():
    def trial(batch: int) -> float:
        if batch > 16:
            raise torch.OutOfMemoryError
        return 1e6 * batch

    assert measured(trial, [4, 8, 16, 32, 64], 1e12) == Memory(0.0, 1e6)
    with pytest.raises(OutOfMemoryError, match="8 images do not fit"):
        measured(trial, [32, 64], 1e12)


def test_the_line_of_two_small_steps_holds_for_a_larger_one(tmp_path):
    config = run.parse([*QUICK, "--data", "synthetic", "--limit", "80", "--batch-size", "8"])
    inputs = load_inputs(config)

    def trial(batch: int) -> float:
        return auto_batch.step_bytes(config, inputs, CPU, None, Backend("eager", ""), None, batch)

    memory = measured(trial, auto_batch.sizes(CPU, 64), 1e12)
    assert memory.fixed + 48 * memory.image == pytest.approx(trial(48), rel=0.1)
    parameters = sum(
        p.numel() for p in run.build(config, 5, Backend("eager", ""), CPU).parameters()
    )
    assert memory.fixed > 4 * 4 * parameters  # weights, their average, and two moments of AdamW


def test_a_run_takes_what_fits_and_a_resumed_one_never_chooses_anew(
    photos,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    """With a pretended limit; beside a run of that batch it is the same bit for bit."""
    flags = [*QUICK, "--data", photos, "--batch-size", "8", "--threads", "1", "--dropout", "0.2"]
    monkeypatch.setattr(auto_batch, "STEPS", 2)
    monkeypatch.setattr(auto_batch, "free_bytes", lambda device: 2**40)
    assert main(*flags, "--auto-batch", "--out", tmp_path / "auto") == 0
    assert "\nbatch: 16 instead of 8 (" in capsys.readouterr().out
    config = read(tmp_path / "auto" / "config.json")
    assert (config["optim"]["batch_size"], config["run"]["auto_batch"]) == (16, False)
    rate = config["optim"]["lr"]
    assert rate == 1.41e-3
    assert main(*flags, "--batch-size", "16", "--lr", rate, "--out", tmp_path / "given") == 0
    states = [
        checkpoint.load(tmp_path / name / "checkpoints" / "last.pt") for name in ("auto", "given")
    ]
    for key, value in states[0]["weights"].items():
        assert torch.equal(value, states[1]["weights"][key]), key
    assert torch.equal(states[0]["rng"], states[1]["rng"])

    def never(device):
        raise AssertionError("chooses anew")

    monkeypatch.setattr(auto_batch, "free_bytes", never)
    (tmp_path / "auto" / "report.html").unlink()
    assert main("--resume", tmp_path / "auto") == 0


def test_memory_that_is_scarce_takes_the_batch_in_parts(photos, tmp_path, monkeypatch, capsys):  # noqa: F811
    flags = [*QUICK, "--data", photos, "--batch-size", "16", "--auto-batch"]
    config = run.parse([str(word) for word in flags])
    inputs = load_inputs(config)
    trial = [
        auto_batch.step_bytes(config, inputs, CPU, None, Backend("eager", ""), None, batch)
        for batch in (4, 8)
    ]
    # what six images take, whatever share of the free memory a batch may have
    free = (trial[0] + (trial[1] - trial[0]) / 2) / auto_batch.SHARE["cpu"]
    monkeypatch.setattr(auto_batch, "free_bytes", lambda device: int(free) + 1000)
    assert main(*flags, "--amp", "off", "--out", tmp_path / "run") == 0
    assert "batch: 16 in 3 parts, since 6 fit (" in capsys.readouterr().out
    assert read(tmp_path / "run" / "config.json")["optim"]["accumulate"] == 3


@pytest.mark.parametrize(
    ("content", "room"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "inactive_file 200"}, 500),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": "anon 1"}, None),
        ({"memory.max": "500", "memory.current": "700", "memory.stat": "anon 1"}, 0),
        ({}, None),
    ],
)
def test_limits_of_control_groups(tmp_path, content, room):
    group = tmp_path / "root" / "outer" / "inner"
    group.mkdir(parents=True)
    for name, text in content.items():
        (group.parent / name).write_text(text + "\n")
    (tmp_path / "cgroup").write_text("0::/outer/inner\n1:cpu:/else\n")
    expected = [] if room is None else [room]
    assert group_rooms(tmp_path / "root", tmp_path / "cgroup") == expected


def test_limits_of_control_groups_of_the_first_version(tmp_path):
    group = tmp_path / "root" / "memory" / "job"
    group.mkdir(parents=True)
    names = {"memory.limit_in_bytes": "900", "memory.usage_in_bytes": "800"}
    for name, text in {**names, "memory.stat": "total_inactive_file 50"}.items():
        (group / name).write_text(text)
    (tmp_path / "cgroup").write_text("5:memory:/job\n")
    assert group_rooms(tmp_path / "root", tmp_path / "cgroup") == [150]
    assert group_rooms(tmp_path / "root", tmp_path / "none") == []


def test_what_is_free_here():
    assert 2**20 < auto_batch.free_bytes(CPU) < 2**50


def test_it_is_refused_where_it_cannot_work(capsys):
    assert main("--auto-batch", "--accumulate", "2") == 2
    assert "--auto-batch chooses --accumulate, too" in capsys.readouterr().err


def test_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(auto_batch.Path, "read_text", lambda self: "")
    with pytest.raises(UsageError, match="on Linux alone: give --batch-size"):
        auto_batch.free_bytes(CPU)
