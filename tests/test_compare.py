"""Faster, slower or noise, against results whose truth is known because they were made up."""

import pytest
import torch

from kernels import timing
from profiling import compare, rows


def row(us, iqr=0.0, n=21, speedup=None, **other):
    """A row as the CSV file holds it, with quartiles `iqr` apart."""
    found = dict.fromkeys(rows.COLUMNS, "")
    found |= {"provider": "ours", "model": "m", "mode": "train", "numerics": "ok"}
    found |= {"us_per_image": us, "low": us - iqr / 2, "high": us + iqr / 2, "n": n}
    found["baseline"] = "eager"
    if speedup:
        found |= dict(zip(("speedup", "speedup_low", "speedup_high"), speedup, strict=True))
    return {name: str(value) for name, value in (found | other).items()}


def word(before, after, **options):
    (verdict,) = compare.compare([before], [after], **options)
    return verdict.word


def test_a_clear_change_is_told_and_a_small_or_unsure_one_is_noise():
    assert word(row(100, 1), row(90, 1)) == "faster"
    assert word(row(100, 1), row(110, 1)) == "slower"
    assert word(row(100, 40), row(110, 40)) == "noise"  # within its interval
    assert word(row(100, 0.01), row(101, 0.01)) == "noise"  # within what another process does
    assert word(row(100, 0.01), row(101, 0.01), least=0.005) == "slower"
    assert word(row(100, 1), row(50, 1, n=1)) == "noise"  # one sample has no interval


def test_a_slow_minute_of_the_machine_is_no_regression():
    before = row(100, 1, speedup=(2.0, 1.98, 2.02))
    assert word(before, row(150, 1, speedup=(2.0, 1.98, 2.02))) == "noise"
    assert word(before, row(150, 1, speedup=(1.4, 1.38, 1.42))) == "slower"
    # only the baseline moved
    assert word(before, row(100, 1, speedup=(1.4, 1.38, 1.42))) == "noise"
    # another baseline is no witness
    other = row(150, 1, speedup=(2.0, 1.98, 2.02), baseline="other")
    assert word(before, other) == "slower"


def test_numbers_that_were_right_and_are_wrong_fail():
    assert word(row(100), row(50, numerics="failed: relative error")) == "wrong"
    assert compare.compare([row(100, numerics="failed: x")], [row(50)]) == []


def test_the_interval_of_a_median_holds_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    for n, least in ((6, 0.88), (21, 0.91)):
        held, trials = 0, 400
        for _ in range(trials):
            noise = 1 + 0.05 * torch.randn(2, n, generator=generator)
            slow, fast = (timing.summarise((scale * one).tolist(), "m")
                          for scale, one in zip((3, 2), noise, strict=True))  # fmt: skip
            pair = [row(t.median_us, t.high_us - t.low_us, n) for t in (slow, fast)]
            _, low, high = compare.ratio_of_times(*pair)
            held += low <= 1.5 <= high
        assert least <= held / trials <= 0.995


def test_the_command_guards(tmp_path, capsys):
    def folder(name, *found):
        for one in found:
            rows.append(tmp_path / name / "results.csv", one)
        return str(tmp_path / name)

    fast = folder("fast", row(100, 1), row(10, 0.1, provider="eager"))
    slow = folder("slow", row(120, 1), row(10, 0.1, provider="eager"))
    other = folder("other", row(100, 1, model="another"))
    assert compare.main([fast, fast]) == 0
    assert compare.main([slow, fast]) == 0
    assert "faster  1.200x [" in capsys.readouterr().out
    assert compare.main([fast, f"{slow}/results.csv"]) == 1
    assert "1 slower, 1 noise" in capsys.readouterr().out
    for pair, said in (([fast, other], "no job in common"), ([fast, "nowhere"], "no results")):
        with pytest.raises(SystemExit) as stopped:
            compare.main(pair)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
