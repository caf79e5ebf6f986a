"""Timing, roofs, the two-error rule and the results file, each against numbers known beforehand."""

import time

import pytest
import torch

from kernels import timing
from kernels.spec import Cost
from profiling import agree, rows
from profiling.roofline import ARCHS, Roofs, blocks_per_multiprocessor, floor_us

CPU = torch.device("cpu")


def _scripted(values):
    remaining = iter(values)
    return timing.Sampler(lambda: next(remaining), "scripted")


def test_median_and_quartiles_are_those_of_the_samples():
    found = timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0], "m")
    assert (found.median_us, found.n, found.method) == (3.0, 5, "m")
    assert found.low_us == pytest.approx(2.0)
    assert found.high_us == pytest.approx(4.0)


def test_providers_take_turns_and_the_first_round_is_thrown_away():
    order = []

    def sampler(name):
        return timing.Sampler(lambda: order.append(name) or float(len(order)), "m")

    found = timing.measure({"a": sampler("a"), "b": sampler("b")}, rounds=3)
    assert order == ["a", "b"] * 4
    assert found["a"].samples == (3.0, 5.0, 7.0)


def test_a_time_limit_stops_sampling_but_never_before_five_rounds():
    found = timing.measure({"a": _scripted([1.0] * 100)}, rounds=50, seconds=0.0)
    assert found["a"].n == timing.FEWEST_ROUNDS


def test_the_ratio_is_paired_so_weather_common_to_both_cancels():
    weather = [1.0, 5.0, 2.0, 9.0, 3.0, 7.0, 4.0]
    found = timing.measure(
        {"slow": _scripted([2 * w for w in [1, *weather]]), "fast": _scripted([1, *weather])},
        rounds=7,
    )
    assert timing.speedup(found["slow"], found["fast"]) == (2.0, 2.0, 2.0)


def test_the_interval_of_a_noisy_ratio_holds_the_truth_and_is_the_same_each_time():
    torch.manual_seed(0)
    noise = torch.exp(0.2 * torch.randn(2, 41)).tolist()
    slow, fast = (
        timing.summarise([v * scale for v in n], "m")
        for n, scale in zip(noise, (3, 2), strict=True)
    )
    middle, low, high = timing.speedup(slow, fast)
    assert low < 1.5 < high
    assert low < middle < high
    assert timing.speedup(slow, fast) == (middle, low, high)


def test_a_ratio_of_unpaired_timings_is_refused():
    with pytest.raises(ValueError, match="one measure"):
        timing.speedup(timing.summarise([1.0, 2.0], "m"), timing.summarise([1.0], "m"))


def test_a_loop_sampler_measures_a_known_pause():
    sampler = timing.loop_sampler([lambda: time.sleep(0.004)], CPU)
    assert 4000 <= sampler.sample() < 8000
    assert sampler.method == "perf_counter"


def test_occupancy_against_figures_of_the_cuda_occupancy_calculator():
    sm_80, sm_86, sm_90 = (ARCHS[name] for name in ("sm_80", "sm_86", "sm_90"))
    assert blocks_per_multiprocessor(sm_80, 32, 0, 8) == 8  # 2048 threads
    assert blocks_per_multiprocessor(sm_80, 40, 0, 4) == 12  # 51 warps by registers
    assert blocks_per_multiprocessor(sm_80, 255, 0, 8) == 1
    assert blocks_per_multiprocessor(sm_86, 32, 0, 1) == 16  # by the number of blocks
    assert blocks_per_multiprocessor(sm_90, 64, 100 << 10, 4) == 2  # by shared memory
    assert blocks_per_multiprocessor(sm_86, 64, 100 << 10, 4) == 0  # does not fit at all


def test_a_floor_is_the_larger_of_memory_and_matrix_time():
    roofs = Roofs(
        "test", copy_gb_s=1000.0, l2_gb_s=0, matmul_tflop_s=100.0, launch_us=0, graph_launch_us=0
    )
    assert floor_us(Cost(flops=1e8, bytes=5e6), roofs) == pytest.approx(5.0)
    assert floor_us(Cost(flops=1e9, bytes=5e6), roofs) == pytest.approx(10.0)


def test_the_two_error_rule_takes_rounding_and_refuses_zeros_scale_nan_and_absence():
    torch.manual_seed(0)
    truth = {"g": torch.randn(10_000)}
    noisy = {"g": truth["g"] + 0.6 * torch.randn(10_000)}  # as bad as bf16 in an untrained network
    alike = {"g": truth["g"] + 0.6 * torch.randn(10_000)}
    assert agree.verdict(alike, noisy, truth) == agree.OK
    assert "cosine" in agree.verdict({"g": torch.zeros(10_000)}, noisy, truth)
    assert "relative error" in agree.verdict({"g": 3 * truth["g"]}, noisy, truth)
    assert "relative error" in agree.verdict({"g": truth["g"] * float("nan")}, noisy, truth)
    assert "missing" in agree.verdict({}, noisy, truth)


def test_a_row_measured_again_replaces_itself_and_leaves_the_others(tmp_path):
    path = tmp_path / "results.csv"
    rows.append(path, {"provider": "a", "batch": 32, "us_per_image": 2.0})
    rows.append(path, {"provider": "b", "batch": 32, "us_per_image": 3.0})
    rows.append(path, {"provider": "a", "batch": 32, "us_per_image": 1.5})
    found = {row["provider"]: row["us_per_image"] for row in rows.read(path)}
    assert found == {"a": "1.5", "b": "3"}
    with pytest.raises(ValueError, match="speed"):
        rows.append(path, {"speed": 1})
