"""The doctor's benchmark: its list, its bookkeeping on made results, its quick part."""

import json
from collections import Counter

import pytest
from scipy.stats import binomtest

from train.doctor.bench import __main__ as command_line
from train.doctor.bench.cases import FAULTS, SOUND, jobs, quick_jobs
from train.doctor.bench.score import score, share, table
from train.doctor.rules import RULES


def result(kind, causes=(), found=(), *, half="scoring", seed=0, told=None):
    """A training's result; found: rules, in capitals where they are problems."""
    return {
        "kind": kind,
        "half": half,
        "seed": seed,
        "causes": list(causes),
        "found": [
            {"rule": r.lower(), "severity": "problem" if r.isupper() else "note"} for r in found
        ],
        "told": told,
        "steps": 100,
        "val_accuracy": 0.5,
        "share": 0.1,
    }


MADE = [
    result("a", ["overfit"], ["OVERFIT", "geometry"], told=40),
    result("b", ["overfit"], ["INPUT", "OVERFIT"], told=20),
    result("c", ["overfit"], ["INPUT", "LEAKAGE", "START_LOSS", "overfit"], told=90),
    result("d", ["overfit", "underfit"], ["underfit"]),
    result("e", ["overfit"]),
    result("f", [], ["UNDERFIT", "GEOMETRY"], told=10),
    result("g", [], ["geometry"]),
    result("h"),
    result("h", seed=1),
]


def test_the_list_is_large_enough_and_halved():
    assert len(FAULTS) >= 25
    every = jobs()
    assert len({job.name for job in every}) == len(every)
    sound = Counter(job.half for job in every if not job.case.causes)
    assert sum(sound.values()) >= 120
    assert min(sound.values()) >= 60
    names = {half: {j.case.name for j in every if j.half == half} for half in sound}
    seeds = {half: {j.seed for j in every if j.half == half} for half in sound}
    assert not names["fixing"] & names["scoring"]
    assert not seeds["fixing"] & seeds["scoring"]
    assert all(count == 5 for count in Counter(job.case.name for job in every).values())
    rules = {rule.id for rule in RULES}
    assert {cause for case in FAULTS for cause in case.causes} <= rules
    assert not any(case.causes for case in SOUND)


def test_what_is_counted():
    scores = score(MADE)
    assert [scores[key]["count"] for key in ("detected", "first", "among", "false")] == [3, 1, 3, 1]
    assert [scores[key]["of"] for key in ("detected", "first", "among", "false")] == [5, 5, 5, 4]
    assert scores["false_causes"] == {"underfit": 1, "geometry": 1}
    assert scores["steps_until_told"] == 40
    assert scores["overhead"] == 0.1


def test_shares_have_wilsons_interval():
    found = share([True] * 28 + [False] * 2)
    expected = binomtest(28, 30).proportion_ci(method="wilson")
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert share([]) is None


def test_the_table_has_every_kind_and_both_halves():
    text = table([*MADE, result("i", ["input"], ["INPUT"], half="fixing", told=1)])
    assert "| | fixing | scoring |" in text
    assert "| faults detected | 100.0% (1 of 1; 20.7 to 100.0) | 60.0% (3 of 5;" in text
    assert "| false PROBLEM in sound trainings | - | 25.0% (1 of 4;" in text
    assert "| causes of the false ones | - | underfit 1, geometry 1 |" in text
    assert "| h | scoring | nothing | 2/2 | - 2 | 50% |" in text
    assert "| d | scoring | overfit or underfit | 0/1 | - 1 | 50% |" in text


def test_finished_trainings_are_not_repeated(tmp_path, monkeypatch, capsys):
    trained = []

    def train(job):
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(job.name)
        return result(job.case.name, job.case.causes, half=job.half, seed=job.seed)

    monkeypatch.setattr(command_line, "train_job", train)
    flags = ["--out", str(tmp_path), "--jobs", "1", "--quick"]
    assert command_line.main(flags) == 130
    assert not (tmp_path / "bench.json").exists()
    kept, trained[:] = list(trained), []
    assert command_line.main([*flags, "--seeds", "1"]) == 130
    assert not set(kept) & set(trained)
    trained[:] = []
    while command_line.main(flags) == 130:
        trained[:] = []
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [r["kind"] for r in record["trainings"]] == [j.case.name for j in quick_jobs()]
    assert record["scores"]["fixing"]["detected"]["count"] == 0
    assert (tmp_path / "bench.md").read_text().strip() in capsys.readouterr().out
    before = list(trained)
    assert command_line.main(flags) == 0
    assert trained == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kinds", "nonsense"], "choose of"),
        (["--half", "better"], "fixing or scoring"),
        (["--jobs", "0"], "at least 1"),
        (["--seeds", "0"], "leave no training"),
    ],
)
def test_flags_that_cannot_work(flags, words, tmp_path, capsys):
    assert command_line.main(["--out", str(tmp_path), *flags]) == 2
    assert words in capsys.readouterr().err


def test_the_quick_part_names_every_fault_and_alarms_on_nothing(tmp_path):
    assert command_line.main(["--out", str(tmp_path), "--jobs", "1", "--quick"]) == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    scores, found = record["scores"]["fixing"], record["trainings"]
    wrong = [(r["kind"], r["found"]) for r in found if r["causes"]]
    assert scores["detected"]["share"] == scores["first"]["share"] == 1, wrong
    assert scores["false"]["count"] == 0, scores["false_causes"]
    assert scores["detected"]["of"] >= 8
    assert scores["false"]["of"] >= 8
    # sound ones learn, or silence would say nothing
    assert min(r["val_accuracy"] for r in found if not r["causes"]) > 0.5
