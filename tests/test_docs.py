"""The pages say what the code says: generated tables, the picture, words, exit codes, footnotes."""

import json
import re
import signal
from pathlib import Path

import pytest

from docs import house, tables
from train import errors
from train.doctor.bench.cases import FAULTS, PHOTO_FAULTS, PHOTO_SOUND, SEEDS, SOUND
from train.doctor.bench.score import score
from train.doctor.rules import RULES
from train.study.modifications import MODIFICATIONS
from train.study.texts import TEXTS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_generated_tables_are_current(page):
    assert page.read_text(encoding="utf-8") == tables.pages()[page], "run python -m docs.tables"


def test_every_rule_has_its_row():
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == [rule.id for rule in RULES]
    assert f"the {len(RULES)} rules" in (ROOT / "docs" / "README.md").read_text(encoding="utf-8")


def test_a_table_without_a_place_is_told(tmp_path):
    (tmp_path / "page.md").write_text("# nothing\n")
    with pytest.raises(ValueError, match="no place for the table rules"):
        tables.filled(tmp_path / "page.md", {"rules": ""})


def training(half, causes, *found):
    found = [{"rule": rule, "severity": severity} for rule, severity in found]
    return {"half": half, "causes": causes, "found": found, "told": None, "share": None}


def test_the_benchmark_is_taken_over_with_its_counts_and_by_rule():
    trainings = [
        training("scoring", ["overfit"], ("input", "note"), ("overfit", "problem")),
        training("scoring", [], ("overfit", "problem")),
        training("fixing", ["overfit", "underfit"], ("input", "problem"), ("overfit", "problem")),
        training("fixing", []),
    ]
    halves = {h: score([t for t in trainings if t["half"] == h]) for h in ("scoring", "fixing")}
    found = tables.record({"scores": halves, "trainings": trainings})
    assert found["scoring"] == {
        "detected": [1, 1], "first": [1, 1], "among": [1, 1], "false": [1, 1]
    }  # fmt: skip
    assert found["fixing"]["first"] == [0, 1]
    assert found["rules"] == {"overfit": {"first": [1, 2]}, "underfit": {"first": [0, 1]}}
    assert "right cause first" in tables.rules(found["rules"])


def test_the_recorded_benchmark_is_a_whole_one():
    """Of all kinds that there are now, with those that need photos: as many in either half."""
    faults, sound = (
        SEEDS * len(kinds) // 2 for kinds in ((*FAULTS, *PHOTO_FAULTS), (*SOUND, *PHOTO_SOUND))
    )
    recorded = json.loads((ROOT / "docs" / "doctor.json").read_text(encoding="utf-8"))
    for half in tables.HALVES:
        assert recorded[half].keys() == tables.SCORES.keys()
        for name, (count, of) in recorded[half].items():
            assert 0 <= count <= of == (sound if name == "false" else faults), name


def test_the_picture_of_the_house_is_current_and_its_text_stays_inside():
    assert house.SVG.read_text(encoding="utf-8") == house.drawn(), "run python -m docs.house"
    for box in house.BOXES:
        assert box.x + box.width <= house.WIDTH - 15
        assert box.y + box.height <= house.HEIGHT - 15
        assert max(map(len, box.lines)) * 6.7 + 14 <= box.width, box.lines[0]
        assert 26 + 24 * (len(box.lines) - 1) + 12 <= box.height, box.lines[0]


def test_the_glossary_has_words_the_project_uses():
    said = " ".join([*TEXTS["id"].values(), json.dumps(MODIFICATIONS, default=str)])
    for rule in RULES:
        said += " ".join(vars(rule.texts["id"]).values())
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", text, re.MULTILINE)[2:]
    assert len(rows) > 50
    said = said.lower()
    words = [row[0].lower().split(", ") for row in rows]
    unused = [ways for ways in words if not any(way in said for way in ways)]
    assert unused == []


def test_exit_codes_are_those_of_the_errors():
    every = {one.exit_code for one in vars(errors).values() if is_error(one)} - {1}
    every |= {0, errors.Stopped(False).exit_code, errors.Stopped(True).exit_code}
    usage = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    shells = {errors.READER_GONE, 128 + signal.SIGTERM}  # what they say of a process ended so
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", usage, re.MULTILINE)}
    assert table == every | shells
    told = README.partition("Exit codes:")[2]
    assert every <= {int(code) for code in re.findall(r"\b(\d+) [a-z]", told)}


def is_error(one) -> bool:
    return isinstance(one, type) and issubclass(one, errors.LapisError)


def test_every_footnote_of_the_table_is_told_and_used():
    table, notes = README.partition("## Beside others")[2].split("What each has by itself")
    used = {int(number) for number in re.findall(r"\[(\d+)\]", table)}
    told = [
        int(number) for number in re.findall(r"^(\d+)\. ", notes.split("## The house")[0], re.M)
    ]
    assert used == set(told)
    assert told == list(range(1, len(told) + 1))
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {8}
