"""Nothing is lost and nothing foreign is run: real processes, real signals, real damage."""

import os
import pickle
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from train import checkpoint, faults
from train.errors import CheckpointError, DiskError
from train.files import remove_temporaries

STAGES = ("opened", "written", "synced", "moved", "replaced")


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
@pytest.mark.parametrize("stage", STAGES)
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
