"""Readers against damaged and foreign input: the short part of `python -m tests.fuzz`, what its
long part has found, and that the harness itself sees what it should see."""

import json
import os
import random
import shutil
import socket
import time

import pytest

from tests import fuzz
from tests.fuzz import block
from tests.fuzz_readers import READERS, Reader, run_folder
from tests.mutations import bend_bytes, bend_json, bend_value
from train.config import from_dict
from train.errors import CheckpointError, DataError, UsageError
from train.record import read_json, read_jsonl, write_json
from train.study.command import model_flags
from train.study.results import read_run, results_csv

FEW = {
    "command": 60,
    "trained": 40,
    "safetensors": 60,
    "onnx": 60,
    "study": 60,
    "signals": 90,
    "weights": 99,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("fuzz") / "run")


@pytest.mark.parametrize("name", READERS)
def test_every_input_is_read_or_refused_in_a_sentence(finished, tmp_path, monkeypatch, name):
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "cache"))
    reader = READERS[name][1](tmp_path, finished)
    count = FEW.get(name, 300)
    found = block(reader, tmp_path, 0, range(count))
    assert found["findings"] == []
    assert found["counts"].total() == count
    assert len(found["counts"]) > 1  # some are read, some are refused


# ---- the harness


def ends(value):
    os._exit(3)


def hangs(value):
    try:
        time.sleep(10)
    except Exception:
        return


def writes(value):
    open(os.path.join(os.path.dirname(os.getcwd()), "outside"), "w").close()


def connects(value):
    with socket.socket(socket.AF_INET6) as client:
        client.connect_ex(("::1", 1))


def hoards(value):
    bytearray(2**33)


def mumbles(value):
    raise DataError("two\nlines")


def stops(value):
    raise SystemExit(2)


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda value: value[7], "TypeError"),
        (ends, "the process ended with 3"),
        (hangs, "more than 0.2 seconds"),
        (writes, "opens"),
        (lambda value: os.rename(__file__, __file__), "os.rename"),
        (lambda value: open("/etc/hostname").close(), "opens '/etc/hostname'"),
        (connects, "socket.connect"),
        (lambda value: os.system("true"), "os.system"),
        (hoards, "MemoryError"),
        (mumbles, "a message that is no sentence"),
        (stops, "exit code 2, or nothing said"),
    ],
)
def test_the_harness_sees(tmp_path, monkeypatch, read, what):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    (tmp_path / "in").mkdir()
    found = block(Reader("bad", lambda rng: None, read), tmp_path / "in", 0, range(2))
    assert [number for number, _ in found["findings"]] == [0, 1]
    assert what in found["findings"][0][1]


def test_an_input_depends_on_its_number_alone():
    reader = Reader("any", lambda rng: bend_bytes(bytes(100), rng), bytes)
    again = [fuzz.numbered(reader, 1, number) for number in (3, 4, 3)]
    assert again[0] == again[2] != again[1]


def test_mutations_change_what_they_are_given():
    rng = random.Random(0)
    data, value = bytes(range(200)), {"a": [1, {"b": "c"}], "d": None}
    assert sum(bend_bytes(data, rng) != data for _ in range(100)) > 90
    assert sum(json.dumps(bend_value(value, rng)) != json.dumps(value) for _ in range(100)) > 90
    assert sum(bend_json(json.dumps(value).encode(), rng).startswith(b"{") for _ in range(100)) > 60
    assert json.dumps(value) == '{"a": [1, {"b": "c"}], "d": null}'


# ---- what was found


def test_json_nested_too_deep_is_damage(tmp_path):
    from train.data import open_photos

    deep = b"[" * 100_000
    (tmp_path / "meta").mkdir()
    for name in ("meta/train.json", "a.json"):
        (tmp_path / name).write_bytes(deep)
    with pytest.raises(DataError, match=r"train\.json is damaged"):
        open_photos(f"food101:{tmp_path}")
    with pytest.raises(CheckpointError, match=r"a\.json is missing or damaged"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.jsonl").write_bytes(deep + b"\n{}\n")
    with pytest.raises(CheckpointError, match="damaged at line 1"):
        read_jsonl(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("config"),
        lambda state: state.pop("classes"),
        lambda state: state.pop("weights"),
        lambda state: state["config"].pop("optim"),
        lambda state: state["config"]["model"].update(model="resnet9"),
        lambda state: state["config"]["data"].update(image_size="large"),
        lambda state: state["config"]["run"].update(unknown=1),
        lambda state: state.update(temperature=float("nan")),
        lambda state: state.update(weights=[1]),
    ],
)
def test_a_sound_file_of_other_content_is_named(finished, tmp_path, change):
    import torch

    from train import checkpoint, export
    from train.predictor import load_trained

    state = checkpoint.load(finished / "checkpoints" / "best.pt")
    change(state)
    checkpoint.save(tmp_path, state, best=True)
    for reader in (lambda path: load_trained(path, torch.device("cpu"), None), export.load_source):
        with pytest.raises(CheckpointError, match=r"best\.pt") as raised:
            reader(tmp_path)
        assert "\n" not in str(raised.value)


def test_a_study_reads_nothing_outside_of_its_runs(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    outside = tmp_path / "outside"
    outside.write_text("x")
    measures = read_json(run / "measures.json")
    measures["files"][str(outside)] = "0"
    write_json(run / "measures.json", measures)
    assert read_run("micro_resnet-seed0", run).measures == measures


def test_results_can_be_written_whatever_a_summary_says(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    text = json.dumps(read_json(run / "summary.json") | {"device": "\ud800"})
    (run / "summary.json").write_text(text)
    assert b"?" in results_csv([read_run("micro_resnet-seed0", run)])


def test_a_field_with_a_line_break_makes_a_sentence():
    with pytest.raises(CheckpointError) as raised:
        from_dict({"model": {"a\nb": 1}, "data": {}, "optim": {}, "run": {}})
    assert "\n" not in str(raised.value)


def test_a_model_with_a_line_break_makes_a_sentence():
    with pytest.raises(UsageError, match=r"'a\\nb' is no model") as raised:
        model_flags("a\nb")
    assert "\n" not in str(raised.value)
