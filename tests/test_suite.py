"""The rooms' timing and the suite's promises: limits, resuming, and a page at the end."""

import dataclasses
import json
import time

import pytest
import torch

import kernels
from profiling import kernel_speed, roofline, rows, suite
from train.record import read_json

TINY = ("--model", "micro_resnet", "--image-size", "32")


def test_a_room_is_measured_both_ways_against_its_reference(tmp_path, monkeypatch):
    small = dataclasses.replace(kernels.KERNELS[0], shapes=((32, 8, 5, 7),))
    monkeypatch.setattr(kernels, "KERNELS", (small,))
    monkeypatch.setitem(kernel_speed.PROVIDERS, "compile", lambda spec: spec.reference)
    flags = ("--kernel", "add_relu", "--batch", "1", "--rounds", "2", "--out", str(tmp_path))
    assert kernel_speed.main([*flags, "--providers", "reference,compile"]) == 0
    found = [row for row in rows.read(tmp_path / "results.csv") if row["shape"] == "1x8x5x7"]
    assert {row["mode"] for row in found} == {"forward", "backward"}
    assert all(float(row["gb_per_s"]) > 0 and row["numerics"] == "ok" for row in found)
    assert sum(bool(row["speedup"]) for row in found) == 2
    roofs = json.loads((tmp_path / "roofs.json").read_text())
    assert roofs["copy_gb_s"] > 1
    assert roofs["device"] == found[0]["device"]
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU times the kernels themselves")
def test_the_interpreter_is_never_timed(monkeypatch):
    spec = dataclasses.replace(
        kernels.KERNELS[0], fused=lambda *_: pytest.fail("the interpreter was timed")
    )
    roofs = roofline.Roofs("here", 1.0, 1.0, 1.0, 1.0, 1.0)
    cpu = torch.device("cpu")
    fused, *others = kernel_speed.measure_room(
        spec, (1, 8, 5, 7), torch.float32, ["fused"], roofs, cpu, 2
    )
    assert fused["numerics"] == "unavailable: needs a CUDA device"
    assert {row["provider"] for row in others} == {"reference"}


def test_a_short_time_shows_every_room_once_before_any_room_twice():
    names = ["bn_act", "conv_stats", "cudnn"]
    tasks = kernel_speed._tasks(names, [4], [torch.bfloat16])
    rooms = [getattr(thing, "name", thing) for thing, *_ in tasks]
    assert rooms[:4] == ["bn_act", "conv_stats", "stem", "bn_act"]
    assert len(tasks) == 4 + 11 + len(kernel_speed.RESNET34)
    assert {batch for _, batch, *_ in tasks} == {4}


def test_a_wrong_room_is_told_of_without_a_speedup():
    spec = kernels.KERNELS[0]
    inputs = spec.make_inputs((1, 8, 4, 4), torch.float32, torch.device("cpu"), torch.Generator())
    assert kernel_speed.check_room(spec, spec.reference, inputs) == "ok"
    assert "y" in kernel_speed.check_room(spec, lambda a, b: a - b, inputs)
    half_gradient = kernel_speed.check_room(
        spec, lambda a, b: spec.reference(a, b.detach() + 0 * b), inputs
    )
    assert "db" in half_gradient


def test_a_step_that_hangs_costs_its_share_and_one_that_crashes_says_why(tmp_path):
    log = tmp_path / "log"
    hanging = suite.Step(
        "hangs", 0.1, {"a": ["-c", "print('begun', flush=True); import time; time.sleep(60)"]}
    )
    start = time.perf_counter()
    outcome = suite.run_step(hanging, 2.0, log)
    assert time.perf_counter() - start < 20
    assert outcome.status.startswith("out of time")
    both = {"a": ["-c", "raise SystemExit('no kernel image')"], "b": ["-c", "print('fine')"]}
    outcome = suite.run_step(suite.Step("crashes", 0.1, both), 20.0, log)
    assert outcome.status == "failed"
    assert outcome.detail == {"a": "exit 1: no kernel image", "b": "fine"}
    assert "begun" in log.read_text()


def test_the_suite_resumes_reports_and_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    names = ("roofs", "train_2_all", "report")
    few = "eager_float32,eager_amp"

    def shortened(settings):
        kept = [step for step in schedule(settings) if step.name in names]
        for step in kept:
            if step.name == "train_2_all":
                step.commands["all"] += ["--providers", few]
        once = f"import pathlib; path = pathlib.Path({str(tmp_path / 'once')!r}); "
        flaky = ["-c", once + "ran = path.exists(); path.touch(); raise SystemExit(not ran)"]
        return [suite.Step("flaky", 0.5, {"flaky": flaky}), *kept]

    schedule = suite.steps
    monkeypatch.setattr(suite, "steps", shortened)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = [*TINY, "--batches", "2", "--rounds", "2", "--minutes", "5", "--out", str(tmp_path)]
    assert suite.main([*flags, "--only", "flaky"]) == 0
    assert read_json(tmp_path / "steps.json")["flaky"]["status"] == "failed"
    assert suite.main(flags) == 0
    ended = read_json(tmp_path / "steps.json")
    assert {name: one["status"] for name, one in ended.items()} == dict.fromkeys(ended, "ok")
    assert set(ended) == {"flaky", *names}
    capsys.readouterr()
    assert suite.main(flags) == 0  # nothing is left to do but the page
    printed = capsys.readouterr().out
    assert "train_2" not in printed
    assert "report: ok" in printed
    summary = (tmp_path / "summary.md").read_text()
    assert "| micro_resnet, train, batch 2, 32 px |" in summary
    assert "| eager_amp |" in summary
    found = {row["provider"] for row in rows.read(tmp_path / "results.csv")}
    assert found == {"eager_float32", "eager_amp"}


def test_every_schedule_ends_with_the_page_and_calls_only_our_commands(tmp_path):
    for cuda in (True, False):
        settings = suite.Settings(tmp_path, 8, "resnet34", "32,256", 224, None, cuda)
        schedule = suite.steps(settings)
        assert schedule[-1].name == "report"
        called = {c[1] for step in schedule for c in step.commands.values() if c[0] == "-m"}
        expected = {"roofline", "speed", "kernel_speed", "report"}
        assert {one for one in called if one != "pytest"} == {f"profiling.{e}" for e in expected}
