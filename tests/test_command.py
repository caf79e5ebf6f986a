"""How commands end whose output goes nowhere: with an exit code, and never in a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
ROOT = Path(__file__).resolve().parents[1]
LONG = """
import sys
from train.command import run_command
def job():
    for _ in range(9):
        print(9999 * "x")
    open(sys.argv[1], "w").close()
sys.exit(run_command(job))
"""


def told(output: int, words: list[str], buffered: bool = True) -> tuple[int, str]:
    """Exit code and errors of a Python process that prints to the descriptor `output`."""
    environment = os.environ | ({} if buffered else {"PYTHONUNBUFFERED": "1"})
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT, env=environment, stdout=output, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.fixture
def full():
    """A device without space."""
    output = os.open("/dev/full", os.O_WRONLY)
    yield output
    os.close(output)


@pytest.fixture
def unread():
    """A pipe whose reader has gone."""
    reader, output = os.pipe()
    os.close(reader)
    yield output
    os.close(output)


@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_output_is_one_sentence(full, buffered, tmp_path):
    code, said = told(full, ["-c", LONG, str(tmp_path / "done")], buffered)
    sentence = "error: the output cannot be written (No space left on device): send it elsewhere\n"
    assert (code, said) == (7, sentence)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("buffered", [True, False])
def test_an_output_that_nobody_reads_ends_silently(unread, buffered, tmp_path):
    assert told(unread, ["-c", LONG, str(tmp_path / "done")], buffered) == (141, "")


def test_what_was_printed_last_counts_too(full):
    short = (
        "import sys; from train.command import run_command as run; sys.exit(run(lambda: print(1)))"
    )
    assert told(full, ["-c", short])[0] == 7


def test_a_training_whose_output_is_full_blames_no_file(full, tmp_path, monkeypatch):
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "cache"))
    words = ["--model", "micro_resnet", "--image-size", "32", "--limit", "60", "--epochs", "1"]
    code, said = told(full, ["-m", "train.run", *words, "--out", str(tmp_path / "run")], False)
    assert code == 7
    assert "error: the output cannot be written" in said
    assert "cache" not in said


def test_the_doctor_explains_to_nobody_without_a_traceback(full):
    assert told(full, ["-m", "train.doctor", "--explain", "overfit"])[0] == 7
