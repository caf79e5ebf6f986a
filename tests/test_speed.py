"""`profiling.speed` end to end at tiny settings: every provider in a process, checked before a
speed-up is told."""

import os
import re
import time

import pytest
import torch

from profiling import agree, meters, providers, rows, speed
from profiling.turns import Contestant, Failed, save_job

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def job():
    return providers.make_job("micro_resnet", "train", 4, 32, CPU)


def broken(job):
    """A kernel that forgets to write a gradient."""
    runner = providers.eager_amp_channels_last(job)
    step = runner.step

    def forgets_the_stem():
        step()
        runner.model.conv1.weight.grad.zero_()

    runner.step = forgets_the_stem
    return runner


def crashing(job):
    raise RuntimeError("no such kernel\nand more")


def dying(job):
    os._exit(7)


def dying_later(job):
    runner = providers.eager_amp(job)
    step, calls = runner.step, []

    def dies():
        calls.append(step())
        if len(calls) == 6:
            os._exit(7)

    runner.step = dies
    return runner


def test_speed_measures_checks_and_writes_every_provider(tmp_path, capsys):
    names = "eager_float32,eager_amp_channels_last,timm_amp_channels_last,ours,ours_graph"
    flags = ("--batch", "4", "--image-size", "32", "--rounds", "2", "--providers", names)
    assert speed.main(["--model", "micro_resnet", *flags, "--out", str(tmp_path)]) == 0
    found = {(row["provider"], row["mode"]): row for row in rows.read(tmp_path / "results.csv")}
    assert len(found) == 10
    for mode in speed.MODES:
        base = found["eager_float32", mode]
        assert base["dtype"] == "float32"
        assert base["speedup"] == ""
        for provider in ("eager_amp_channels_last", "ours"):
            row = found[provider, mode]
            assert (row["numerics"], row["baseline"], row["n"]) == ("ok", "eager_float32", "2")
            assert float(row["speedup_low"]) <= float(row["speedup"]) <= float(row["speedup_high"])
            rate = 1e6 / float(row["us_per_image"])
            assert float(row["images_per_second"]) == pytest.approx(rate, rel=1e-4)
            assert float(row["first_step_s"]) > 0
        reason = found["timm_amp_channels_last", mode]["numerics"]
        assert reason == "unavailable: timm has no micro_resnet"
    assert "images/s" in capsys.readouterr().out
    assert "--batch 4" in (tmp_path / rows.COMMANDS).read_text()


def test_wrong_gradients_get_no_speedup_and_a_crash_stops_nobody(job):
    wanted = (crashing, dying, broken, providers.eager_amp)
    found = speed.measure_job(job, providers.eager_float32, wanted, rounds=2, seconds=1.0)
    crashed, died, wrong, good = found
    assert crashed["numerics"] == "failed: RuntimeError: no such kernel"
    assert died["numerics"] == "failed: its process ended with 7"
    assert "us_per_image" not in crashed
    assert wrong["us_per_image"] > 0
    assert "speedup" not in wrong
    assert "gradient of conv1.weight" in wrong["numerics"]
    assert "no speed-up" in speed.describe(wrong)
    assert "x [" not in speed.describe(wrong)
    assert good["speedup"] > 0
    assert "x [" in speed.describe(good)


def test_a_wrong_baseline_gives_no_ratio(job):
    with pytest.raises(Failed, match="wrong numbers"):
        list(speed.measure_job(job, broken, (providers.eager_amp,), rounds=2, seconds=1.0))


def test_one_that_dies_while_it_is_timed_says_so(job):
    wanted = (dying_later,)
    (row,) = speed.measure_job(job, providers.eager_float32, wanted, rounds=5, seconds=60.0)
    assert row["numerics"] == "failed: its process ended with 7 in the timing"
    assert "us_per_image" not in row


def slow_to_start(job):
    time.sleep(60)


def test_one_that_is_not_ready_in_time_is_left_out_and_the_others_are_timed(job):
    wanted = (providers.eager_amp, slow_to_start, providers.ours)
    until = time.perf_counter() + 30
    found = list(speed.measure_job(job, providers.eager_float32, wanted, 2, 1.0, until))
    assert time.perf_counter() < until + 10
    rows_of = {row["provider"]: row for row in found}
    assert rows_of["eager_amp"]["speedup"] > 0
    assert re.fullmatch(r"out of time: not ready after \d+ s", rows_of["slow_to_start"]["numerics"])
    assert rows_of["ours"]["numerics"].startswith("out of time")


def test_the_baseline_is_one_provider(tmp_path, capsys):
    for flags, word in (
        (("--baseline", "eager_amp,ours"), "--baseline: one provider"),
        (("--providers", "cutlass"), "'cutlass'"),
        (("--mode", "eval"), "'eval'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            speed.main([*flags, "--out", str(tmp_path)])
        assert stopped.value.code == 2
        assert word in capsys.readouterr().err


def test_a_check_starts_from_the_common_weights_however_many_steps_went_before(job):
    runner = providers.eager_float32(job)
    first = runner.outputs(job.state)
    for _ in range(3):
        runner.step()
    again = runner.outputs(job.state)
    assert first.keys() == again.keys()
    for name, value in first.items():
        torch.testing.assert_close(again[name], value)


def test_a_process_gives_what_this_one_gives(job, tmp_path):
    expected = providers.eager_amp(job).outputs(job.state)
    with Contestant(providers.eager_amp, save_job(job, tmp_path)) as contestant:
        assert agree.verdict(contestant.outputs(), expected, expected) == agree.OK
        assert contestant.sample() > 0
        assert contestant.joules() is None
        assert contestant.facts.dtype == "bfloat16"
    assert [path.name for path in tmp_path.iterdir()] == ["job.pt"]
    with pytest.raises(Failed, match="unavailable: a CUDA graph needs"):
        Contestant(providers.ours_graph, tmp_path / "job.pt")


def test_timm_and_torchvision_compute_the_same_network():
    state = providers.peer_model("resnet18").eval().state_dict()
    images = torch.randn(2, 3, 64, 64)
    outputs = []
    for make in (providers.peer_model, providers.timm_model):
        model = make("resnet18").eval()
        model.load_state_dict(state)
        with torch.no_grad():
            outputs.append(model(images))
    torch.testing.assert_close(*outputs)


def test_resident_memory_is_that_of_the_step():
    megabytes = 64

    def step():
        torch.ones(megabytes << 18)  # 4 bytes each, written, then freed

    found = meters.resident_above(step)
    if found is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert abs(found - (megabytes << 20)) < 8 << 20  # Linux counts pages a few at a time late
    assert meters.resident_above(lambda: None) < 4 << 20
    assert meters.joules_of(step, CPU) is None
