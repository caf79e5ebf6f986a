"""--tensorboard: the run's own numbers as events; without the package a sentence, and never at the
cost of the training."""

import importlib.util
import signal
import sys
from types import ModuleType
from typing import ClassVar

import pytest

from tests.test_run import QUICK
from train import run
from train.record import read_jsonl
from train.tensorboard import CURVES, FOLDER

FLAGS = [*QUICK, "--limit", "50", "--threads", "1", "--no-doctor"]
STEPS = 2  # of an epoch: 40 photos in batches of 32
MODULE = "torch.utils.tensorboard"


def main(*argv: object) -> int:
    return run.main([str(word) for word in argv])


class Writer:
    """Stands in for PyTorch's SummaryWriter, and remembers."""

    made: ClassVar[list["Writer"]]
    broken: ClassVar[bool]

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step = folder, purge_step
        self.scalars, self.images, self.closed = [], [], False
        self.made.append(self)

    def add_scalar(self, tag, value, step):
        if self.broken:
            raise OSError("No space left on device")
        self.scalars.append((tag, value, step))

    def add_image(self, tag, picture, step, dataformats):
        self.images.append((tag, picture.shape, step, dataformats))

    def flush(self): ...

    def close(self):
        self.closed = True


@pytest.fixture
def writer(monkeypatch):
    monkeypatch.setattr(Writer, "made", [], raising=False)
    monkeypatch.setattr(Writer, "broken", False, raising=False)
    module = ModuleType(MODULE)
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, MODULE, module)
    return Writer


def expected(folder):
    """(tag, value, step) of every epoch in metrics.jsonl."""
    return {
        (tag, row[name], STEPS * row["epoch"])
        for row in read_jsonl(folder / "metrics.jsonl")
        for name, tag in CURVES.items()
        if row[name] is not None
    }


@pytest.mark.parametrize("extra", [[], ["--val-fraction", "0"]])
def test_every_step_and_epoch_is_written(extra, writer, tmp_path):
    out = tmp_path / "r"
    assert main(*FLAGS, *extra, "--out", out, "--tensorboard") == 0
    (one,) = writer.made
    assert (one.folder, one.purge_step, one.closed) == (str(out / FOLDER), 0, True)
    steps = [(step, value) for tag, value, step in one.scalars if tag == "loss/step"]
    assert [step for step, _ in steps] == list(range(1, len(steps) + 1))
    assert {row for row in one.scalars if row[0] != "loss/step"} == expected(out)
    assert any("validation" in tag for tag, _, _ in one.scalars) == (not extra)
    ((tag, shape, step, order),) = one.images
    assert (tag, shape[2], step, order) == ("training batch", 3, 0, "HWC")


def test_a_run_taken_up_purges_what_came_after_its_checkpoint(writer, tmp_path, monkeypatch):
    class Signal(run.Listener):
        def step_ended(self, step):
            if step.number == STEPS:
                signal.raise_signal(signal.SIGTERM)

    out = tmp_path / "r"
    argv = [str(word) for word in (*FLAGS, "--out", out, "--tensorboard")]
    assert run.main(argv, watching=[Signal()]) == 75
    assert main("--resume", out) == 0
    first, second = writer.made
    assert second.purge_step >= STEPS
    assert (len(first.images), len(second.images)) == (1, 0)
    assert {row for row in first.scalars + second.scalars if row[0] != "loss/step"} == expected(out)


def test_off_by_default(writer, tmp_path):
    assert main(*FLAGS, "--epochs", "1", "--out", tmp_path / "r") == 0
    assert writer.made == []


def test_the_missing_package_is_a_usage_error_before_anything_is_done(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, MODULE, None)
    out = tmp_path / "r"
    assert main(*FLAGS, "--out", out, "--tensorboard") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --tensorboard needs a package (")
    assert error.endswith("): pip install 'tensorboard>=2.18'\n")
    assert not out.exists()


def test_files_that_cannot_be_written_do_not_end_a_training(writer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writer, "broken", True)
    assert main(*FLAGS, "--out", tmp_path / "r", "--tensorboard") == 0
    said = capsys.readouterr().err
    assert said.count("TensorBoard's files are not written any more (No space left") == 1


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_tensorboard_itself_reads_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "r"
    assert main(*FLAGS, "--out", out, "--tensorboard") == 0
    events = EventAccumulator(str(out / FOLDER)).Reload()
    for tag, value, step in expected(out):
        assert (step, pytest.approx(value)) in [(e.step, e.value) for e in events.Scalars(tag)]
    assert [e.step for e in events.Scalars("loss/step")] == [1, 2, 3, 4]
    (image,) = events.Images("training batch")
    assert image.encoded_image_string.startswith(b"\x89PNG")
