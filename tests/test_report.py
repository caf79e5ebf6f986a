"""The page of a folder of measurements: its sentence against made-up rows, what it withholds, and a
browser that has nothing to complain about."""

import json
import shutil

import pytest

from kernels.choices import Choice, Key, Rival
from kernels.store import Store
from profiling import report, rows, verdict
from profiling.report import RESULTS
from tests.test_compare import row
from tests.test_page import BROWSER, Tags, console

PLACE = {"device": "a card", "batch": "32", "image_size": "224", "images_per_second": 1e4}


def network(us, speedup=None, **other):
    return row(us, 0.01 * us, speedup=speedup, **PLACE | {"baseline": "eager_amp"} | other)


def sentence(*measured):
    return verdict.verdict(verdict.standings(measured))


def test_the_sentence_names_the_best_of_ours_and_the_best_rival():
    base = network(100.0, provider="eager_amp")
    ours = network(50.0, (2.0, 1.9, 2.1), provider="ours_graph")
    slow = network(90.0, (1.1, 1.0, 1.2), provider="ours")
    rival = network(80.0, (1.25, 1.2, 1.3), provider="compile_default")
    kind, words = sentence(base, slow, ours, rival)
    assert kind == "good"
    assert words == (
        "On a card m trains 10,000 images/s at batch 32, 2.00 times the speed of `eager_amp` and"
        " 1.60 times that of the best rival, `compile_default`."
    )
    level = network(50.2, (1.99, 1.9, 2.1), provider="compile_default")
    assert "level with the best rival" in sentence(base, ours, level)[1]
    better = network(25.0, (4.0, 3.9, 4.1), provider="compile_default")
    kind, words = sentence(base, ours, better)
    assert kind == "warn"
    assert "0.50 times that of the best rival" in words


def test_wrong_numbers_lead_nowhere():
    base = network(100.0, provider="eager_amp")
    wrong = network(10.0, provider="ours_graph", numerics="failed: relative error")
    kind, words = sentence(base, wrong)
    assert kind == "info"
    assert "10,000" not in words
    cheat = network(1.0, provider="compile_default", numerics="failed: relative error")
    ours = network(50.0, (2.0, 1.9, 2.1), provider="ours_graph")
    assert "compile_default" not in sentence(base, ours, cheat)[1]


@pytest.fixture(autouse=True)
def _no_plans_of_the_user(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def full(tmp_path):
    """A folder with everything a report can show, and a room whose tests failed."""
    shutil.copytree(RESULTS / "h100", tmp_path, dirs_exist_ok=True)
    place = next(one for one in rows.read(tmp_path / "results.csv"))
    bad = {
        name: place[name]
        for name in (*rows.KEY, "date", "baseline")
        if name not in ("provider", "numerics")
    }
    bad |= {"provider": "compile_max_autotune", "us_per_image": 1.25, "low": 1.2, "high": 1.3}
    bad |= {"n": 5, "images_per_second": 8e5, "numerics": "failed: relative error of logits"}
    rows.append(tmp_path / "results.csv", bad)
    loader = network(50.0, provider="loader", mode="batches", model="photos")
    rows.append(tmp_path / "results.csv", loader)
    steps = json.loads((tmp_path / "steps.json").read_text())
    steps["numerics"]["detail"]["avg_pool"] = "exit 1: 1 failed"
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    key = Key("identity block <64>", "bfloat16", place["device"], 132, "580", "2", "3", "9", "ab")
    rivals = {"P1": Rival(9.5, 9.4, 9.6), "P3": Rival(7.25, 7.2, 7.3), "P4": Rival(refused="NaN")}
    Store(tmp_path).add(Choice(key, "P3", "P1", rivals, "1.31x faster than P1"))
    shutil.copy(_picture(tmp_path), tmp_path / "profile.png")
    return tmp_path


def _picture(folder):
    from profiling.pictures import Bar, draw_bars

    path = folder / "drawn.png"
    path.write_bytes(draw_bars([("job", [Bar("ours", 1.0, 0.9, 1.1, "1", "#c8672b")])], "us"))
    return path


def test_the_page_shows_everything_and_withholds_what_is_wrong(full):
    assert report.main([str(full)]) == 0
    document = (full / "report.html").read_text()
    found = Tags(document)
    assert found.open == []
    words = "".join(found.words)
    for expected in (
        "1.31 times that of the best rival",  # 96.9157 / 73.7083
        "1.70x\u00a0[1.70,\u00a01.70]",
        "identity block <64>",
        "7.2 (7.2 to 7.3)",
        "refused",
        "784 TFLOP/s",
        "source+41634d6e",
        "failed: relative error of logits",
        "its tests did not pass",
        "Other measurements",
    ):
        assert expected in words, expected
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 5  # networks, memory, roofline, timeline, history
    summary = (full / "summary.md").read_text()
    for name in ("networks", "memory", "roofline", "profile", "history"):
        assert f"]({name}.png)" in summary
        assert (full / f"{name}.png").exists()
    pooled = [line for line in summary.splitlines() if line.startswith("| avg_pool")]
    assert pooled
    assert not any("x\u00a0[" in line for line in pooled)
    autotuned = [line for line in summary.splitlines() if line.startswith("| compile_max_autotune")]
    assert autotuned
    assert "wrong numbers" in autotuned[0]
    assert "x\u00a0[" not in autotuned[0]


def test_the_committed_summary_is_what_the_report_writes(tmp_path):
    shutil.copytree(RESULTS / "h100", tmp_path / "h100")
    path = tmp_path / "h100" / "summary.md"
    committed = _until_history(path.read_text())
    assert report.main([str(tmp_path / "h100")]) == 0
    assert _until_history(path.read_text()) == committed


def _until_history(summary):
    """The history may have grown by the results of other folders."""
    return summary.partition("## History")[0]


def test_a_job_that_was_never_timed_has_a_row_and_no_bar(tmp_path):
    late = network(1.0, provider="ours_graph", numerics="unavailable: no time")
    rows.append(tmp_path / "results.csv", {**late, "us_per_image": "", "low": "", "high": ""})
    assert report.main([str(tmp_path)]) == 0
    assert "unavailable: no time" in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / "networks.png").exists()


def test_an_empty_folder_is_an_error_with_a_cure(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 3
    assert "python -m profiling.speed" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_opens_it_without_a_word_and_without_a_request(full):
    assert report.main([str(full)]) == 0
    assert console(full / "report.html") == []
