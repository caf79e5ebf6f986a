"""Nothing is lost and nothing foreign is run: real processes, real signals, real damage."""

import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import kills
from tests.forks import (
    FLAGS,
    PLAIN,
    RICH,
    differences,
    end,
    errors,
    final,
    fresh,
    go_on,
    resume,
    start,
    wait_for,
)
from train import checkpoint, faults, run
from train.errors import CheckpointError, DiskError
from train.files import remove_temporaries
from train.loop import Listener

ROOT = Path(__file__).resolve().parents[1]


def state(step: int) -> dict:
    """A small state whose every part tells the step."""
    return {"steps": step, "weights": {"w": torch.arange(2000.0) + step}, "history": [step]}


def in_child(job) -> int:
    """Do `job` in a fork; its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            job()
        except BaseException:
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- checkpoints


@pytest.fixture
def saved(tmp_path) -> Path:
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step), best=True)
    return tmp_path


def test_a_checkpoint_opens_with_pytorch_alone(saved):
    for mmap in (False, True):
        found = torch.load(saved / "last.pt", weights_only=True, mmap=mmap)
        assert found["schema"] == checkpoint.SCHEMA
        assert torch.equal(found["weights"]["w"], state(2)["weights"]["w"])


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99, 0.9999])
def test_a_cut_checkpoint_is_noticed_and_the_one_before_used(saved, share):
    content = (saved / "last.pt").read_bytes()
    (saved / "last.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"last\.pt is cut off"):
        checkpoint.load(saved / "last.pt")
    with pytest.warns(UserWarning, match=r"last\.pt is cut off.*previous\.pt takes its place"):
        found, path = checkpoint.load_newest(saved)
    assert (found["steps"], path.name) == (1, "previous.pt")
    checkpoint.tidy(saved, path)
    checkpoint.save(saved, state(2), best=False)  # a damaged one never becomes the previous one
    assert checkpoint.load(saved / "previous.pt")["steps"] == 1


def test_every_flipped_bit_is_noticed(saved):
    content = (saved / "last.pt").read_bytes()
    rng = np.random.default_rng(0)
    ends = range(len(content) - checkpoint.SEAL, len(content))
    places = [0, *rng.integers(0, len(content), 300), *ends]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        (saved / "last.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError):
            checkpoint.load(saved / "last.pt")


class Harmful:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_made_to_harm_is_not_run(saved, as_zip):
    harm = Harmful(saved / "harm")
    if as_zip:
        torch.save({"schema": checkpoint.SCHEMA, "harm": harm}, saved / "last.pt")
    else:
        (saved / "last.pt").write_bytes(pickle.dumps(harm, protocol=2))
    content = (saved / "last.pt").read_bytes()
    for data in (content, checkpoint.sealed(content)):
        (saved / "last.pt").write_bytes(data)
        with pytest.raises(CheckpointError):
            checkpoint.load(saved / "last.pt")
        assert not (saved / "harm").exists()


@pytest.mark.parametrize("file", ["best.pt", "last.pt"])
@pytest.mark.parametrize("stage", kills.STAGES)
def test_killed_at_any_write_boundary_there_is_a_whole_checkpoint(saved, file, stage):
    def job():
        faults._wanted = f"{file}:{stage}"
        checkpoint.save(saved, state(3), best=True)

    code = in_child(job)
    if (file, stage) == ("best.pt", "moved"):  # nothing is moved there
        assert code == 0
        return
    assert code == -signal.SIGKILL
    found, path = checkpoint.load_newest(saved)
    assert found["steps"] == (3 if (file, stage) == ("last.pt", "replaced") else 2)
    assert checkpoint.load(saved / "best.pt")["steps"] in (2, 3)
    checkpoint.tidy(saved, path)
    assert not list(saved.glob(".*"))
    checkpoint.save(saved, state(4), best=False)
    found, _ = checkpoint.load_newest(saved)
    assert found["steps"] == 4
    assert checkpoint.load(saved / "previous.pt")["steps"] in (2, 3)


def test_a_full_disk_leaves_the_old_checkpoints_and_says_what_is_needed(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY", 0.01)

    def job():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        with pytest.raises(DiskError, match=r"last\.pt: File too large.* needs [\d,]+ bytes"):
            checkpoint.save(saved, state(3), best=False)

    assert in_child(job) == 0
    assert checkpoint.load_newest(saved)[0]["steps"] == 2
    assert checkpoint.load(saved / "previous.pt")["steps"] == 1
    assert not list(saved.glob(".*"))


def test_only_temporaries_are_removed(tmp_path):
    for name in (".last.pt.0123abcd", ".lock", ".gitignore", "last.pt.0123abcd"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock",
        ".gitignore",
        "last.pt.0123abcd",
    }


# ---- whole runs


@pytest.fixture(autouse=True)
def one_thread():
    """A fork of a process whose threads compute would wait for them forever; `seeded` sets back."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs nobody disturbed, by their flags."""
    kept = {}

    def get(flags: list[str]) -> dict:
        if tuple(flags) not in kept:
            folder = tmp_path_factory.mktemp("whole") / "run"
            assert end(fresh(folder, *flags)) == 0, errors(folder)
            kept[tuple(flags)] = final(folder)
        return kept[tuple(flags)]

    return get


def assert_resumes(folder: Path, expected: dict) -> None:
    assert resume(folder) == 0, errors(folder)
    assert differences(final(folder), expected) == []


def assert_goes_on(folder: Path, flags: list[str], expected: dict) -> None:
    """Killed before it was a run, the same command starts it again."""
    assert end(go_on(folder, flags)) == 0, errors(folder)
    assert differences(final(folder), expected) == []


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (RICH, "config.json:replaced"),
        (RICH, "last.pt:synced"),
        (RICH, "last.pt:moved:3"),
        (RICH, "best.pt:replaced"),
        (RICH, "metrics.jsonl:replaced:4"),
        (PLAIN, "last.pt:written:7"),
        (PLAIN, "last.pt:replaced:8"),
        (PLAIN, "summary.json:synced"),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, whole, flags, fault):
    folder = tmp_path / "run"
    assert end(fresh(folder, *flags, fault=fault)) == -signal.SIGKILL, errors(folder)
    assert_goes_on(folder, flags, whole(flags))


def test_the_command_line_itself(tmp_path, whole):
    """A process of its own, with the fault from the environment, then stopped, then let finish."""
    folder, command = tmp_path / "run", [sys.executable, "-m", "train.run"]
    place = {"cwd": ROOT, "env": {**os.environ, "LAPIS_FAULT": "last.pt:moved:2"}}
    started = [*command, *FLAGS, "--out", str(folder), *RICH]
    assert subprocess.run(started, check=False, **place).returncode == -signal.SIGKILL
    assert not (folder / "checkpoints" / "last.pt").exists()
    stale = list((folder / "checkpoints").glob(".last.pt.*"))
    assert len(stale) == 1
    place["env"]["LAPIS_FAULT"] = "last.pt:written:2:wait"
    process = subprocess.Popen([*command, "--resume", str(folder)], stderr=-1, text=True, **place)
    wait_for(lambda: {*(folder / "checkpoints").glob(".last.pt.*")} - {*stale})
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75
    assert f"and saved; to go on: python -m train.run --resume {folder}" in said
    assert_resumes(folder, whole(RICH))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_between_two_steps_and_the_run_goes_on(tmp_path, whole, number, code):
    folder = tmp_path / "run"
    child = fresh(folder, *RICH)
    wait_for(lambda: (folder / "signals.jsonl").exists())
    began = time.monotonic()
    os.kill(child, number)
    assert end(child) == code, errors(folder)
    assert time.monotonic() - began < 30
    assert f"--resume {folder}" in errors(folder)
    state, _ = checkpoint.load_newest(folder / "checkpoints")
    assert state["tally"]["steps"] > 0
    assert_resumes(folder, whole(RICH))


@pytest.mark.parametrize(("step", "steps"), [(1, 2), (7, 7)])
def test_a_signal_behind_the_first_step_and_the_last(tmp_path, whole, monkeypatch, step, steps):
    folder = tmp_path / "run"

    class Signal(Listener):
        def step_ended(self, done):
            if done.number == step:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run, "main", partial(run.main, watching=[Signal()]))
    assert end(fresh(folder, *PLAIN)) == 75
    # after the next step, if there is one; else before validation
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["tally"]["steps"] == steps
    assert f"stopped after step {steps} of epoch 1 and saved" in errors(folder)
    monkeypatch.undo()
    assert_resumes(folder, whole(PLAIN))


def test_signals_during_a_save_corrupt_nothing(tmp_path, whole):
    folder = tmp_path / "run"
    child = fresh(folder, *RICH, fault="last.pt:written:3:wait")
    wait_for(lambda: (folder / "signals.jsonl").exists())
    wait_for(lambda: list((folder / "checkpoints").glob(".last.pt.*")))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        os.kill(child, number)
        time.sleep(0.05)
    assert end(child) == 75
    for name in ("last", "previous"):
        checkpoint.load(folder / "checkpoints" / f"{name}.pt")
    assert_resumes(folder, whole(RICH))


def test_a_damaged_checkpoint_costs_one_interval(tmp_path, whole):
    folder = tmp_path / "run"
    assert end(fresh(folder, *RICH, fault="last.pt:replaced:3")) == -signal.SIGKILL
    last = folder / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    assert_resumes(folder, whole(RICH))
    said = folder.with_suffix(".said").read_text()
    assert "warning: " in errors(folder)
    assert "previous.pt takes its place" in errors(folder)
    assert "after step 3 of epoch 1 (previous.pt)" in said
    for name in ("last", "previous"):
        (folder / "checkpoints" / f"{name}.pt").write_bytes(b"")
    assert resume(folder) == 4
    assert "nothing to resume from" in errors(folder)


def test_a_full_disk_costs_checkpoints_and_not_the_training(tmp_path, monkeypatch):
    """Until the last one: then the run ends with 7, and can be taken up where it was saved."""
    monkeypatch.setattr(checkpoint, "RETRY", 0.01)
    folder = tmp_path / "run"

    class Full(Listener):
        def step_ended(self, step):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    monkeypatch.setattr(run, "main", partial(run.main, watching=[Full()]))
    assert end(fresh(folder)) == 7
    said = errors(folder)
    assert said.count("the training goes on") == 2
    assert " bytes): not saved" in said
    assert "error: cannot write " in said
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["history"] == []
    monkeypatch.undo()
    assert resume(folder) == 0


def test_two_runs_in_one_folder_and_the_lock_of_a_dead_one(tmp_path):
    folder, copy = tmp_path / "run", tmp_path / "other"
    child = fresh(folder, fault="last.pt:synced:2:wait")
    wait_for(lambda: (folder / "config.json").exists())
    os.kill(child, signal.SIGSTOP)
    for words in (["--resume", folder], [*FLAGS, "--out", folder]):
        assert end(start(copy, *words)) == 8
        assert f"in use by process {child} on {socket.gethostname()}" in errors(copy)
    os.kill(child, signal.SIGKILL)
    assert end(child) == -signal.SIGKILL
    assert resume(folder) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    assert resume(folder) == 0  # once more
    assert "is finished" in folder.with_suffix(".said").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in before}


# ---- by the dozen: python -m pytest -m faults


@pytest.mark.faults
@pytest.mark.parametrize("passes", kills.PASSES)
@pytest.mark.parametrize("file", kills.FILES)
@pytest.mark.parametrize("stage", kills.STAGES)
def test_killed_at_every_write_boundary(tmp_path, whole, stage, file, passes):
    folder = tmp_path / "run"
    ends = kills.at_boundary(folder, RICH, f"{file}:{stage}:{passes}")
    # some points are passed less often, and then nothing is killed
    assert [one.code for one in ends] in ([0], [-signal.SIGKILL, 0]), errors(folder)
    assert differences(final(folder), whole(RICH)) == []


@pytest.mark.faults
@pytest.mark.parametrize("number", range(50))
def test_killed_at_random_moments_again_and_again(tmp_path, whole, number):
    """Until the run is done: bit-equal each time, whatever the moments were."""
    flags, folder = (PLAIN, RICH)[number % 2], tmp_path / "run"
    expected, rng = whole(flags), np.random.default_rng(number)
    *codes, last = (one.code for one in kills.at_random(folder, flags, rng))
    # before it is a run SIGTERM ends it as it ends any process
    assert set(codes) <= {0, -signal.SIGKILL, 75, -signal.SIGTERM}, errors(folder)
    assert last == 0, errors(folder)
    assert differences(final(folder), expected) == []
