"""The measuring commands end to end at tiny settings, and the suite's promises: limits, resuming,
and no speed-up for wrong numbers."""

import dataclasses
import json
import time

import pytest
import torch

import kernels
import models
from profiling import kernel_speed, rows, speed, suite

TINY = ("--model", "micro_resnet", "--image-size", "32")


@pytest.fixture(autouse=True)
def _ours_without_compiling(monkeypatch):
    def eager(name, device, plan):
        return models.build_model(name, num_classes=speed.CLASSES, backend="eager")

    if not torch.cuda.is_available():
        monkeypatch.setattr(speed, "our_model", eager)


def _broken(job):
    runner = speed.eager_amp_channels_last(job)
    step = runner.step

    def forgets_the_stem():
        step()
        runner.model.conv1.weight.grad.zero_()

    runner.step = forgets_the_stem
    return runner


def _crashing(job):
    raise RuntimeError("no such kernel")


def test_speed_measures_checks_and_writes_every_provider(tmp_path, capsys):
    names = "eager_amp_channels_last,eager_float32,eager_amp_channels_last_graph,ours"
    flags = ("--batch", "4", "--rounds", "2", "--out", str(tmp_path), "--providers", names)
    assert speed.main([*TINY, *flags]) == 0
    found = {(row["provider"], row["mode"]): row for row in rows.read(tmp_path / "results.csv")}
    assert len(found) == 8
    for mode in speed.MODES:
        for provider in ("eager_float32", "ours"):
            row = found[provider, mode]
            assert row["numerics"] == "ok"
            assert float(row["speedup_low"]) <= float(row["speedup"]) <= float(row["speedup_high"])
            rate = 1e6 / float(row["us_per_image"])
            assert float(row["images_per_second"]) == pytest.approx(rate, rel=1e-4)
        assert found["eager_amp_channels_last", mode]["speedup"] == ""
    assert found["eager_float32", "train"]["dtype"] == "float32"
    assert "images/s" in capsys.readouterr().out


def test_wrong_gradients_get_no_speedup_and_a_crash_stops_nobody():
    job = speed.make_job("micro_resnet", "train", 4, 32, torch.device("cpu"))
    providers = (_crashing, _broken, speed.eager_amp)
    crashed, broken, good = speed.measure_job(job, providers, rounds=2, seconds=1.0)
    assert crashed["numerics"] == "failed: RuntimeError: no such kernel"
    assert "us_per_image" not in crashed
    assert broken["us_per_image"] > 0
    assert "speedup" not in broken
    assert "gradient of conv1.weight" in broken["numerics"]
    assert "no speed-up" in speed.describe(broken)
    assert good["speedup"] > 0


def test_a_check_starts_from_the_common_weights_however_many_steps_went_before():
    job = speed.make_job("micro_resnet", "train", 4, 32, torch.device("cpu"))
    runner = speed.eager_float32(job)
    first = runner.outputs(job.state)
    for _ in range(3):
        runner.step()
    again = runner.outputs(job.state)
    assert first.keys() == again.keys()
    for name, value in first.items():
        torch.testing.assert_close(again[name], value)


def test_a_room_is_measured_both_ways_against_its_reference(tmp_path, monkeypatch):
    small = dataclasses.replace(kernels.KERNELS[0], shapes=((32, 8, 5, 7),))
    monkeypatch.setattr(kernels, "KERNELS", (small,))
    flags = ("--kernel", "add_relu", "--batch", "1", "--rounds", "2", "--out", str(tmp_path))
    assert kernel_speed.main([*flags, "--providers", "reference,fused"]) == 0
    found = [row for row in rows.read(tmp_path / "results.csv") if row["shape"] == "1x8x5x7"]
    assert {row["mode"] for row in found} == {"forward", "backward"}
    assert all(float(row["gb_per_s"]) > 0 and row["numerics"] == "ok" for row in found)
    assert sum(bool(row["speedup"]) for row in found) == 2
    assert json.loads((tmp_path / "roofs.json").read_text())["copy_gb_s"] > 1


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
    def shortened(settings):
        kept = [step for step in schedule(settings) if step.name in ("roofs", "train_2_eager_amp")]
        once = f"import pathlib; path = pathlib.Path({str(tmp_path / 'once')!r}); "
        flaky = ["-c", once + "ran = path.exists(); path.touch(); raise SystemExit(not ran)"]
        return [suite.Step("flaky", 0.5, {"flaky": flaky}), *kept]

    schedule = suite.steps
    monkeypatch.setattr(suite, "steps", shortened)
    flags = [*TINY, "--batches", "2", "--rounds", "2", "--minutes", "3", "--out", str(tmp_path)]
    assert suite.main([*flags, "--only", "flaky"]) == 0
    assert json.loads((tmp_path / "steps.json").read_text())["flaky"]["status"] == "failed"
    assert suite.main(flags) == 0
    ended = json.loads((tmp_path / "steps.json").read_text())
    assert {name: one["status"] for name, one in ended.items()} == dict.fromkeys(ended, "ok")
    assert set(ended) == {"flaky", "roofs", "train_2_eager_amp"}
    capsys.readouterr()
    assert suite.main(flags) == 0  # nothing is left to do
    assert "train_2" not in capsys.readouterr().out
    summary = (tmp_path / "summary.md").read_text()
    assert "## micro_resnet, train, batch 2" in summary
    assert "| eager_amp |" in summary
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["roofs"]["matmul_tflop_s"] > 0
    assert {row["provider"] for row in results["rows"]} == {"eager_float32", "eager_amp"}


def test_no_speedup_is_told_of_a_room_whose_tests_failed(tmp_path):
    row = {
        "provider": "fused",
        "mode": "forward",
        "batch": 2,
        "us_per_image": 1.0,
        "numerics": "ok",
    }
    rows.append(tmp_path / "results.csv", {**row, "model": "right", "speedup": 1.25})
    rows.append(tmp_path / "results.csv", {**row, "model": "wrong", "speedup": 1.75})
    detail = {"right": "12 passed in 3 s", "wrong": "exit 1: 1 failed, 11 passed in 3 s"}
    summary = suite.write_results(tmp_path, {"numerics": suite.Outcome("failed", 3.0, detail)})
    assert "1.25" in summary
    assert "1.75" not in summary
