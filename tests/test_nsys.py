"""The profiling commands from the outside: real runs of a micro network, stand-ins for an nsys that
misbehaves, and Nsight Systems itself where it is installed."""

import json
import os
import stat
import time
from pathlib import Path

import pytest

from profiling import nsys, train_profile, window
from profiling.profile_files import write_profile
from profiling.ranges import Range, Trace
from profiling.traces import read_chrome
from tests.test_graphs import Rerun, captured
from tests.test_nvtx import LAYERS
from tests.test_step import Batches
from train import run
from train.loop import fit
from train.page import Page
from train.profile_section import add_profile
from train.record import read_jsonl

QUICK = ["--model", "micro_resnet", "--image-size", "32", "--batch-size", "8", "--limit", "40"]
QUICK += ["--epochs", "2", "--threads", "1", "--workers", "0"]
WINDOW = ["--skip", "1", "--steps", "3"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAPIS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def main(command, out, *words, flags=QUICK):
    return command.main([*WINDOW, "--out", str(out), *map(str, words), "--", *flags])


def stand_in(folder: Path, script: str) -> Path:
    """An nsys that does what the shell script says."""
    path = folder / "nsys"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def paths(folder: Path) -> list[str]:
    profile = json.loads((folder / "profile.json").read_text())
    return ["/".join(row["path"]) for row in profile["rows"]]


STEP = [
    "step",
    "step/data",
    "step/forward",
    *(f"step/forward/{layer}" for layer in LAYERS),
    "step/backward",
    *(f"step/backward/{layer}" for layer in reversed(LAYERS)),
    "step/optimizer",
]


def test_torch_profiler_then_against_it(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    assert main(nsys, tmp_path / "a", "--trace", trace) == 0
    assert paths(tmp_path / "a") == STEP
    profile = json.loads((tmp_path / "a" / "profile.json").read_text())
    assert (profile["steps"], profile["device"]) == (3, "CPU")
    rows = {"/".join(row["path"]): row for row in profile["rows"]}
    assert rows["step/forward/layer2.0"]["shape"] == "8x16x8x8"
    assert any("convolution" in name for name, *_ in rows["step/backward/layer2.0"]["top"])
    parts = sum(rows[f"step/{part}"]["device"] for part in ("forward", "backward", "optimizer"))
    assert 0 < parts <= rows["step"]["device"]
    assert len(read_chrome(trace).ranges) == 3 * len(STEP)
    assert not (tmp_path / "run").exists()

    assert main(nsys, tmp_path / "b", "--kineto", "--against", tmp_path / "a") == 0
    page = (tmp_path / "b" / "profile.html").read_text()
    assert "Against" in page
    assert "layer4.0" in page
    assert "times as fast" in capsys.readouterr().out


def test_a_profiled_training_is_a_normal_one_with_one_section_more(tmp_path, capsys):
    assert run.main([*QUICK, "--out", str(tmp_path / "plain")]) == 0
    flags = [*QUICK, "--out", str(tmp_path / "profiled")]
    assert train_profile.main([*WINDOW, "--", *flags]) == 0
    losses = [
        [row["train_loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")]
        for name in ("plain", "profiled")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert paths(tmp_path / "profiled") == STEP
    pages = [(tmp_path / name / "report.html").read_text() for name in ("plain", "profiled")]
    assert ["time goes" in page for page in pages] == [False, True]
    assert "layer3.0" in pages[1]
    assert pages[1].count("<img") == pages[0].count("<img") + 1


def test_nsight_systems_itself(tmp_path):
    if nsys.find_nsys() is None:
        pytest.skip("nsys is not installed: `.ci/nsight FOLDER` unpacks it, then put it on PATH")
    assert main(nsys, tmp_path, "--limit", "120") == 0
    assert paths(tmp_path) == STEP
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["source"] == "Nsight Systems"
    assert {row["count"] for row in profile["rows"]} == {3}
    assert profile["rows"][2]["shape"] == "8x3x32x32"


@pytest.mark.parametrize("command", [nsys, train_profile, window])
def test_flags_without_the_two_dashes(command, capsys):
    assert command.main(["--steps", "3"]) == 2
    assert "the training's flags go after `--`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "flags", "message"),
    [
        (["--steps", "0"], QUICK, "--steps must be at least 1"),
        (["--skip", "-1"], QUICK, "--skip must be at least 0"),
        ([], ["--fused", "--backend", "eager"], "--fused means --backend auto"),
        ([], ["--resume", "runs/x"], "profile with the flags of the run"),
        (["--against", "nowhere"], QUICK, "nowhere/profile.json is no profile"),
    ],
)
def test_what_cannot_be_profiled_says_so(own, flags, message, tmp_path, capsys):
    assert nsys.main(["--out", str(tmp_path), *own, "--", *flags]) in (2, 3)
    assert message in capsys.readouterr().err


def test_an_unknown_flag_of_the_training_ends_before_anything_runs(tmp_path, capsys):
    assert nsys.main(["--out", str(tmp_path), "--", "--modle", "resnet34"]) == 2
    assert "did you mean --model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_nsys_that_hangs_is_ended_with_all_it_started(tmp_path, capsys, monkeypatch):
    fake = stand_in(tmp_path, f"sleep 60 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setattr(nsys, "find_nsys", lambda: fake)
    started = time.monotonic()
    assert main(nsys, tmp_path / "out", "--limit", "1") == 1
    assert time.monotonic() - started < 30
    assert "did not finish within 1 s: raise --limit" in capsys.readouterr().err
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while _running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _running(child)


def _running(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_an_nsys_that_records_nothing_or_cannot_import(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nsys, "find_nsys", lambda: stand_in(tmp_path, "exit 7"))
    assert main(nsys, tmp_path / "out") == 1
    assert "recorded nothing (exit code 7)" in capsys.readouterr().err
    fake = stand_in(tmp_path, f"touch {tmp_path}/out/trace.qdstrm")
    monkeypatch.setattr(nsys, "find_nsys", lambda: fake)
    assert main(nsys, tmp_path / "out") == 1
    assert "QdstrmImporter, is not beside" in capsys.readouterr().err


def test_the_importer_is_found_where_debian_puts_it(tmp_path):
    real = tmp_path / "usr/lib/x86_64-linux-gnu/nsight-systems/target-linux-x64/nsys"
    importer = tmp_path / "usr/lib/nsight-systems/host-linux-x64/QdstrmImporter"
    for path in (real, importer):
        path.parent.mkdir(parents=True)
        path.touch()
    (tmp_path / "usr/bin").mkdir()
    (tmp_path / "usr/bin/nsys").symlink_to(real)
    assert nsys.find_importer(tmp_path / "usr/bin/nsys") == importer


def test_the_command_traces_what_the_machine_has():
    settings = window.Settings(skip=4, steps=9, no_graph=True)
    with_gpu, without = (
        nsys.profile_command(Path("nsys"), Path("o"), settings, ["--fused"], cuda)
        for cuda in (True, False)
    )
    assert "--trace=cuda,nvtx,cudnn,cublas" in with_gpu
    assert "--capture-range=cudaProfilerApi" in with_gpu
    assert "--trace=nvtx" in without
    assert "--capture-range=nvtx" in without
    for command in (with_gpu, without):
        assert {"--sample=none", "--cpuctxsw=none"} < set(command)
        words = command[command.index("profiling.window") :]
        assert words[3:] == ["--skip", "4", "--steps", "9", "--no-graph", "--", "--fused"]


class Counting(window.Recorder):
    def __init__(self):
        self.calls = []

    def start(self):
        self.calls.append("start")

    def stop(self):
        self.calls.append("stop")


@pytest.mark.parametrize("no_graph", [False, True])
def test_a_captured_step_runs_launch_by_launch_if_asked(no_graph, tmp_path, capsys):
    graph, recorder, folders = Rerun(), Counting(), []
    training = captured(graph)
    watch = window.Window(window.Settings(2, 3, no_graph), recorder, folders.append)
    watch.run_started(tmp_path, training)
    fit(training, Batches((8,) * 6), None, 5, [watch])
    assert (graph.replays == 0) == no_graph
    assert ("--no-graph launches every kernel" in capsys.readouterr().out) != no_graph
    assert (recorder.calls, folders) == (["start", "stop"], [tmp_path])


@pytest.mark.parametrize(("skip", "steps", "first"), [(0, 1000, 0), (100, 3, 5), (2, 9, 0)])
def test_a_training_shorter_than_the_window(skip, steps, first, tmp_path, capsys):
    recorder, folders = Counting(), []
    training = captured(Rerun())  # of eight steps
    watch = window.Window(window.Settings(skip, steps, True), recorder, folders.append)
    watch.run_started(tmp_path, training)
    fit(training, Batches((8,) * 8), None, 5, [watch])
    assert (recorder.calls, folders) == (["start", "stop"], [tmp_path])
    assert (watch.first, watch.last) == (first, 8)
    late = window.Window(window.Settings(0, 3, True), Counting(), folders.append)
    late.run_started(tmp_path, training)  # resumed after its end
    assert late.recorder.calls == []


@pytest.mark.parametrize("command", [nsys, window])
def test_a_training_that_fails_says_why_and_ends_with_its_code(command, tmp_path, capsys):
    own = ["--kineto"] if command is nsys else ["--capture", "nvtx"]
    out = ["--out", str(tmp_path / "out")] if command is nsys else []
    flags = [*QUICK, "--data", str(tmp_path / "nowhere")]
    try:
        status = command.main([*own, *out, "--", *flags])
    except SystemExit as ended:
        status = ended.code
    assert status == 3
    assert "nowhere" in capsys.readouterr().err


def test_a_damaged_profile_is_named_and_the_report_still_written(tmp_path):
    for content in ("{", "{}", '{"rows": 3}'):
        (tmp_path / "profile.json").write_text(content)
        page = Page("report")
        add_profile(page, tmp_path)
        assert "profile the training again" in page.html()
    write_profile(tmp_path, Trace([Range("step", 1, 0, 9)], [], "none"), "test")
    (tmp_path / "profile.png").unlink()
    page = Page("report")
    add_profile(page, tmp_path)
    assert "profile.png" in page.html()
    (tmp_path / "profile.json").unlink()
    page = Page("report")
    add_profile(page, tmp_path)
    assert "<h2" not in page.html()
    assert os.listdir(tmp_path) == []
