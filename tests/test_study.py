"""The study from the outside: killed and taken up by two processes, its claims, its report."""

import csv
import json
import os
import re
import signal
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train import run
from train.study import claims
from train.study.claims import STALE, claim
from train.study.command import main, model_flags
from train.study.measure import measure
from train.study.modifications import MODIFICATIONS
from train.study.texts import LANGUAGES, TEXTS
from train.study.workers import Job, Workers
from train.validation import read_validation

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 15
QUICK = ["--recipe", "report", "--image-size", "32", "--lr", "0.05", "--amp", "off", "--no-doctor"]
RUNS = [f"micro_{kind}-seed{seed}" for seed in (0, 1) for kind in ("plain", "resnet")]


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Three classes of 14 small pictures that differ in colour; two files are copies."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, colour in enumerate([(200, 40, 40), (40, 200, 40), (40, 40, 200)]):
        folder = root / f"class<{label}>"
        folder.mkdir()
        for i in range(14):
            pixels = np.clip(rng.normal(0, 90, (40, 48, 3)) + colour, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    return root


def flags_of(photos: Path, out: Path) -> list[str]:
    models = ["--models", "micro_plain,micro_resnet", "--seeds", "2", "--threads", "1"]
    return ["--data", str(photos), "--out", str(out), *models, *QUICK, "--epochs", str(EPOCHS)]


def start(flags: list[str]) -> subprocess.Popen:
    words = [sys.executable, "-m", "train.study", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def shared(photos, tmp_path_factory) -> dict:
    """A study killed in its second run, then taken up by two processes at once."""
    out = tmp_path_factory.mktemp("study") / "s"
    flags = flags_of(photos, out)
    first = start(flags)
    done, half = (out / "runs" / name for name in RUNS[:2])
    deadline = time.monotonic() + 200
    while not (half / "checkpoints" / "last.pt").exists():
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    trained_by = children(first.pid)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    facts = {"out": out, "flags": flags, "half_was_done": (half / "summary.json").exists()}
    while any(Path(f"/proc/{pid}").exists() for pid in trained_by):
        assert time.monotonic() < deadline, "the run outlived its study"
        time.sleep(0.05)
    facts["trained_by"] = trained_by
    facts["done_before"] = stamps(done)
    pair = [start(flags) for _ in range(2)]
    facts["said"] = [process.communicate(timeout=200)[0].decode() for process in pair]
    facts["codes"] = [process.returncode for process in pair]
    facts["pids"] = [process.pid for process in pair]
    return facts


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_killed_study_goes_on_and_two_processes_share_it(shared):
    out = shared["out"]
    assert shared["codes"] == [0, 0], shared["said"]
    assert len(shared["trained_by"]) == 1
    assert not shared["half_was_done"]
    assert stamps(out / "runs" / RUNS[0]) == shared["done_before"]
    log = (out / "runs" / RUNS[1] / "log.txt").read_text()
    assert log.count("resuming ") == 1
    assert log.count("run folder: ") == 2
    for name in RUNS:
        epochs = [json.loads(x)["epoch"] for x in (out / "runs" / name / "metrics.jsonl").open()]
        assert sorted(set(epochs)) == list(range(1, EPOCHS + 1))
        text = (out / "runs" / name / "log.txt").read_text()
        assert text.count("done in ") == 1
    last = {name: sorted((out / "claims").glob(f"{name}.*"))[-1] for name in RUNS}
    holders = {name: json.loads(path.read_text()) for name, path in last.items()}
    assert all(holder["released"] for holder in holders.values())
    assert {holders[name]["pid"] for name in RUNS[1:]} == set(shared["pids"])


def test_runs_of_a_seed_share_split_and_validation_photos(shared):
    for seed in (0, 1):
        folders = [shared["out"] / "runs" / f"micro_{k}-seed{seed}" for k in ("plain", "resnet")]
        splits = {(folder / "split.csv").read_bytes() for folder in folders}
        assert len(splits) == 1
        rows = list(csv.DictReader(splits.pop().decode().splitlines()))
        for folder in folders:
            found = read_validation(folder)
            assert list(found.files) == [r["filename"] for r in rows if r["split"] == "val"]
            assert len(set(found.pictures)) < len(found.files) or seed
            summary = json.loads((folder / "summary.json").read_text())
            assert found.right.mean() == pytest.approx(summary["best_val_accuracy"])


def numbers_in(text: str) -> list[str]:
    return re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)


def written(value: object) -> set[str]:
    """Every way the report may write a number of its files."""
    if isinstance(value, dict):
        return set().union(*map(written, value.values()))
    if isinstance(value, list):
        return set().union(*map(written, value))
    try:
        number = abs(float(value))
    except (TypeError, ValueError):
        return set()
    ways = [f"{number:.3f}", f"{number:.2f}", f"{100 * number:.1f}", f"{number:,.1f}"]
    ways += [f"{number / 1e9:.3g}", f"{number / 1e6:,.0f}", f"{number:,.0f}", str(value)]
    return set(ways)


def test_every_number_of_the_tables_stands_in_a_file(shared):
    out = shared["out"]
    report = (out / "report.md").read_text()
    known = written(json.loads((out / "statistics.json").read_text()))
    known |= written(list(csv.DictReader((out / "results.csv").open())))
    assert {row["state"] for row in csv.DictReader((out / "results.csv").open())} == {"finished"}
    changes = {"0.0", "0.000", "100.0", "0.001"}  # the ends of what is possible
    values = json.loads((out / "statistics.json").read_text())
    plain, residual = (values["statistics"][f"micro_{kind}"] for kind in ("plain", "resnet"))
    for name, one in plain.items():
        if isinstance(one, dict) and "value" in one and one["value"]:
            change = residual[name]["value"] - one["value"]
            changes |= written(change) | written(change / one["value"])
    parameters = residual["parameters"] - plain["parameters"]
    changes |= written(parameters) | written(parameters / plain["parameters"])
    tables = [line for line in report.splitlines() if line.startswith("| ")]
    cells = [cell for line in tables for cell in line.split("|")[2:-1]]
    cells = [cell for cell in cells if not re.search(r"seed|class|95 %|CPU", cell)]
    missing = {n for cell in cells for n in numbers_in(cell)} - known - changes
    assert len(cells) > 100
    assert not missing


def test_the_report_says_what_was_found(shared):
    out = shared["out"]
    page = (out / "report.html").read_text()
    for words in ("Conclusion", "micro_plain against micro_resnet", "Paired tests", "Trade-off"):
        assert words in page
    assert "class&lt;0&gt;" in page
    assert "class<0>" not in page
    assert "published" not in page.lower()  # its networks are others
    values = json.loads((out / "statistics.json").read_text())
    (one,) = values["comparisons"]
    assert (one["first"], one["second"]) == ("micro_plain", "micro_resnet")
    assert one["pairs"] == ["0", "1"]
    assert one["overlap"] == pytest.approx(9 / 36, abs=0.05)
    accuracy = [
        json.loads((out / "runs" / name / "summary.json").read_text())["best_val_accuracy"]
        for name in RUNS
    ]
    expected = (accuracy[1] - accuracy[0] + accuracy[3] - accuracy[2]) / 2
    assert one["best_val_accuracy"]["value"] == pytest.approx(expected)
    depth = json.loads((out / "runs" / RUNS[1] / "measures.json").read_text())["depth"]
    assert depth[0]["epoch"] == 0
    assert depth[-1]["epoch"] == EPOCHS
    assert depth[-1]["loss"] < depth[0]["loss"]


def test_in_indonesian_and_without_training_again(shared, capsys):
    assert main([*shared["flags"], "--language", "id"]) == 0
    captured = capsys.readouterr()
    assert "4 of 4 runs are finished already" in captured.out + captured.err
    page = (shared["out"] / "report.html").read_text()
    assert '<html lang="id">' in page
    for words in ("Analisis Performa Model Dasar", "Analisis Trade-off", "Jumlah Parameter"):
        assert words in page
    assert main([*shared["flags"], "--lr", "1"]) == 2
    assert "holds a study with flags" in capsys.readouterr().err


def test_a_failed_run_does_not_end_the_rest(photos, tmp_path, capsys):
    """Its reason is told, the other is reported, and its exit code is the study's."""
    damaged = tmp_path / "runs" / "micro_plain-seed0" / "checkpoints" / "last.pt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"half a checkpoint")
    flags = ["--data", str(photos), "--out", str(tmp_path), "--models", "micro_plain,micro_resnet"]
    assert main([*flags, "--seeds", "1", *QUICK, "--epochs", "2", "--jobs", "2"]) == 4
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "1 of 2 runs failed" in error
    assert "nothing to resume from" in error
    assert "log.txt" in error
    rows = {row["model"]: row for row in csv.DictReader((tmp_path / "results.csv").open())}
    assert rows["micro_resnet"]["state"] == "finished"
    assert rows["micro_plain"]["state"].startswith("failed: nothing to resume from")
    page = (tmp_path / "report.html").read_text()
    assert "1 of 2 runs failed" in page
    assert "Nothing was compared" in page
    assert damaged.read_bytes() == b"half a checkpoint"


def test_measured_weights_are_those_the_run_began_with(photos, tmp_path):
    """With a rate too small to change a weight, start and end are one."""
    out = tmp_path / "r"
    flags = [*QUICK, "--model", "micro_resnet", "--lr", "1e-30", "--epochs", "1", "--seed", "3"]
    assert run.main([*flags, "--data", str(photos), "--out", str(out), "--threads", "1"]) == 0
    measure(out, None)
    values = json.loads((out / "measures.json").read_text())
    start, end = values["depth"]
    assert (start["epoch"], end["epoch"]) == (0, 1)
    assert start["loss"] == pytest.approx(end["loss"], rel=1e-6)
    assert start["blocks"] == end["blocks"]
    listed = json.loads((out / "pictures.json").read_text())
    assert listed
    assert all((out / one["picture"]).is_file() for one in listed)
    assert all((one["label"] == one["named"]) == (one["kind"] == "known") for one in listed)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--seed", "3"], "--seed is what a study varies"),
        (["--out=x", "--resume=y"], "--resume=y is what a study varies"),
        (["--models", "micro_plain+wings"], "unknown part 'wings'"),
        (["--models", "micro_plain+se+se"], "has se twice"),
        (["--models", "micro_plain+mixup=many"], "does not take these flags"),
        (["--models", "micro_plain+seed=3"], "unknown part 'seed=3'"),
        (["--models", "micro_nothing"], "unknown model 'micro_nothing'"),
        (["--print-config"], "--print-config is what a study varies or decides"),
        (["--wings"], "--wings is no flag"),
        (["--lr", "fast"], "does not take these flags for the model"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--folds", "1"], "at least 2 folds"),
        (["--folds", "0"], "--folds must be at least 1"),
    ],
)
def test_bad_flags_end_with_one_sentence(flags, words, tmp_path, capsys):
    base = ["--data", "synthetic", "--models", "micro_plain", "--out", str(tmp_path / "s")]
    assert main([*base, *flags]) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "s").exists()


def test_modifications_are_flags():
    assert model_flags("resnet34") == ("--model", "resnet34")
    flags = model_flags("resnet34+se+norm=group+drop-path=0.1")
    parsed = run.parse(list(flags)).model
    assert (parsed.se, parsed.norm, parsed.drop_path, parsed.preact) == (True, "group", 0.1, False)


def test_ingredients_of_a_recipe_are_compared_too():
    flags = model_flags("resnet34+mixup=0+se+optimizer=adamw+no-nesterov+weight-decay=5e-2")
    parsed = run.parse(["--mixup", "0.2", *flags])
    assert (parsed.model.se, parsed.data.mixup) == (True, 0.0)
    assert (parsed.optim.optimizer, parsed.optim.weight_decay) == ("adamw", 0.05)
    assert not parsed.optim.nesterov


def test_a_job_is_claimed_once(tmp_path):
    won, barrier = [], threading.Barrier(12)

    def take() -> None:
        barrier.wait()
        won.append(claim(tmp_path, "a-seed0"))

    threads = [threading.Thread(target=take) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (held,) = filter(None, won)
    assert held.beat()
    assert claim(tmp_path, "a-seed0") is None
    assert claim(tmp_path, "a-seed01")
    assert claim(tmp_path, "a") is not None
    held.release()
    again = claim(tmp_path, "a-seed0")
    assert again is not None
    assert not held.beat()


def test_ctrl_c_waits_for_the_runs_and_gives_their_claims_back(tmp_path, monkeypatch):
    def run_until_stopped(workers: Workers, *_: object) -> None:
        time.sleep(0.1)  # the main thread waits by now
        os.kill(os.getpid(), signal.SIGINT)
        assert workers.stopped.wait(20)
        time.sleep(0.3)

    monkeypatch.setattr(Workers, "_do", run_until_stopped)
    job = Job("a-seed0", tmp_path / "a", ())
    # a shell starts what runs in the background with Ctrl-C ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Workers([job], tmp_path, threads=1).work(1, epochs=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads((tmp_path / "a-seed0.1").read_text())["released"]


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path):
    code = "import time; from pathlib import Path; from train.study.claims import claim\n"
    code += f"claim(Path({str(tmp_path)!r}), 'job'); print('claimed', flush=True); time.sleep(60)"
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"claimed\n"
        assert claim(tmp_path, "job") is None
        process.kill()
    assert claim(tmp_path, "job") is not None


def test_another_machine_loses_its_claim_when_its_heart_stops(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(claims, "_host", lambda: "elsewhere")
        held = claim(tmp_path, "job")
    assert claim(tmp_path, "job") is None
    past = time.time() - STALE
    os.utime(held.path, (past + 20, past + 20))
    assert claim(tmp_path, "job") is None
    os.utime(held.path, (past - 20, past - 20))
    taken = claim(tmp_path, "job")
    assert taken is not None
    assert taken.path.name == "job.2"
    assert not held.beat()


def test_every_language_says_everything():
    def places(text: str) -> set[str]:
        return {name.partition(":")[0] for _, name, _, _ in string.Formatter().parse(text) if name}

    english = TEXTS["en"]
    for language in LANGUAGES:
        assert set(TEXTS[language]) == set(english)
        for key, text in TEXTS[language].items():
            assert places(text) == places(english[key]), key
        for name, texts in MODIFICATIONS.items():
            why, what = texts[language]
            assert len(re.findall(r"[^.]\.(?: |$)", why)) == 2, name
            assert what.endswith(".")
