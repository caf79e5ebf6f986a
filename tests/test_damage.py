"""A flipped bit, or a cut, anywhere in a file that is read back: the same result as before, or an
error that names the file; never another result. (Checkpoints: tests/test_faults.py.)"""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.choices import Choice, Key, Rival
from kernels.store import Store
from profiling.profile_files import read_profile
from profiling.suite import read_outcomes
from tests.fuzz_readers import run_folder
from train import export, inputs
from train.data import known, load_images, open_photos
from train.data.split_file import read_split
from train.doctor.signals import FILE, load
from train.errors import CheckpointError, DataError
from train.predictor import load_trained
from train.record import read_jsonl, write_json
from train.study.results import read_run, results_csv
from train.transfer import read_weights

CUTS = (0.0, 0.01, 0.5, 0.99)
CPU = torch.device("cpu")


def damaged(path: Path, flips: int = 40) -> Iterator[None]:
    """The file at `path` cut at each of CUTS, then with one bit flipped at random places; whole
    again at the end."""
    content, rng = path.read_bytes(), np.random.default_rng(0)
    try:
        for share in CUTS:
            path.write_bytes(content[: int(share * len(content))])
            yield
        for place in rng.integers(0, len(content), flips):
            changed = bytearray(content)
            changed[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            yield
    finally:
        path.write_bytes(content)


def refusals(path: Path, read, truth, error, flips: int = 40) -> int:
    """How often `read` refused the damaged file; each time else it must have given `truth`."""
    messages = []
    for _ in damaged(path, flips):
        try:
            assert read() == truth
        except error as raised:
            messages.append(str(raised))
    assert all(path.name in message and "\n" not in message for message in messages)
    assert read() == truth
    return len(messages)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return run_folder(tmp_path_factory.mktemp("damage") / "run")


@pytest.fixture
def photos(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for label in ("x", "y"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / label / f"{number}.png")
    return tmp_path / "set"


# ---- what is kept between runs: made anew where it is damaged


def test_cached_squares(photos, tmp_path):
    found = open_photos(str(photos))
    cached = {"cache_dir": tmp_path / "cache", "progress": False}
    pixels = load_images(found, 8, **cached)[0].copy()
    (path,) = (tmp_path / "cache").glob("*.images")
    for _ in damaged(path, 10):
        assert np.array_equal(load_images(found, 8, **cached)[0], pixels)


def test_remembered_digests(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "SETTLED_NS", -1)
    digests = open_photos(str(photos)).digests
    (path,) = (tmp_path / "cache").glob("*.known.json")
    with monkeypatch.context() as patch:  # they are remembered
        patch.setattr("train.data.photos.hashlib.file_digest", None)
        assert open_photos(str(photos)).digests == digests
    for _ in damaged(path):
        assert open_photos(str(photos)).digests == digests


def test_remembered_pictures(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "cache"))
    found = open_photos(str(photos))
    squares, found = load_images(found, 8, progress=False)
    pictures = inputs.pictures_of(squares, found).tolist()
    (path,) = (tmp_path / "cache").glob("*.pictures.json")
    for _ in damaged(path):
        assert inputs.pictures_of(squares, found).tolist() == pictures


def test_measured_plans(tmp_path):
    place = dict.fromkeys(("gpu", "driver", "torch", "triton", "cudnn", "source"), "x")
    key = Key(what="conv", dtype="float32", multiprocessors=1, **place)
    rivals = {"a": Rival(2.0, 1.0, 3.0), "b": Rival(4.0, 3.5, 4.5)}
    Store(tmp_path, tmp_path / "none").add(Choice(key, "a", "b", rivals, "2.00x faster"))
    truth, path = Store(tmp_path, tmp_path / "none").read(), tmp_path / "plans.json"
    for _ in damaged(path):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = Store(tmp_path, tmp_path / "none").read()
        assert found == truth or (found == {} and "plans.json is not used" in str(said[0].message))


# ---- what a run has written


def test_split_csv(finished):
    found = open_photos("synthetic")
    rows = {line.split(",")[0] for line in (finished / "split.csv").read_text().splitlines()}
    found = found.subset([i for i, file in enumerate(found.files) if file in rows])
    path = finished / "split.csv"
    truth = read_split(path, found)
    assert refusals(path, lambda: read_split(path, found), truth, DataError) > 20


@pytest.mark.parametrize("name", [FILE, "metrics.jsonl"])
def test_json_lines(finished, name):
    """Whole lines before a cut remain, as after a crash; a changed one is an error, the last one is
    taken for torn."""
    path = finished / name
    truth, messages = read_jsonl(path), []
    for _ in damaged(path, 80):
        try:
            found = read_jsonl(path)
        except CheckpointError as error:
            messages.append(str(error))
            continue
        # where the bit is in the name of the checksum, it is one more member, and all others hold
        assert len(found) <= len(truth)
        assert [{k: f[k] for k in t} for t, f in zip(truth, found, strict=False)] == truth[
            : len(found)
        ]
    assert len(messages) > 20
    assert all(f"{name} is damaged at line " in message for message in messages)
    assert load(finished).steps > 0


NAMES = ("summary.json", "measures.json", "metrics.jsonl", "validation.csv", "pictures.json")


@pytest.mark.parametrize("name", [*NAMES, "split.csv"])
def test_what_a_study_reads(finished, name):
    def read() -> tuple:
        run = read_run("micro_resnet-seed0", finished)
        seconds = [row["seconds"] for row in run.history]
        return results_csv([run]), seconds, run.validation.probability.tolist()

    assert refusals(finished / name, read, read(), CheckpointError, 12) > 10


def test_an_exported_network(finished, tmp_path):
    path = tmp_path / "model.safetensors"
    export.export_safetensors(export.load_source(finished), path)

    def read() -> tuple:
        trained = load_trained(path, CPU, None)
        weights = [value.tolist() for value in trained.model.state_dict().values()]
        return trained.classes, trained.config, trained.temperature, weights

    assert refusals(path, read, read(), CheckpointError, 10) > 10


def test_an_exported_program(finished, tmp_path):
    path, source = tmp_path / "model.onnx", export.load_source(finished)
    export.export_onnx(source, path)

    def read() -> tuple:
        trained = load_trained(path, CPU, None)
        logits = trained.forward(source.example(2)).tolist()
        return trained.classes, trained.config, trained.temperature, logits

    assert refusals(path, read, read(), CheckpointError, 20) == len(CUTS) + 20


def test_weights_in_a_pth_file(finished, tmp_path):
    path = tmp_path / "model.pth"
    export.export_state_dict(export.load_source(finished), path)

    def read() -> dict:
        return {name: value.tolist() for name, value in read_weights(path).items()}

    assert refusals(path, read, read(), CheckpointError, 10) > 8


def test_profiles(tmp_path):
    row = {"path": ["step"], "shape": "", "share": 1.0, "device": 9, "gaps": 1, "host": 9}
    rows = [row | {"kernels": 2, "top": [["k", 1, 9]]}]
    values = {"source": "x", "device": "GPU", "steps": 3, "outside": 0, "rows": rows}
    write_json(tmp_path / "profile.json", values)
    truth = read_profile(tmp_path)
    path = tmp_path / "profile.json"
    assert refusals(path, lambda: read_profile(tmp_path), truth, DataError) > 20


def test_steps_of_the_suite(tmp_path):
    path = tmp_path / "steps.json"
    write_json(path, {"numerics": {"status": "ok", "seconds": 2.5, "detail": {"x": "y"}}})
    assert refusals(path, lambda: read_outcomes(tmp_path), read_outcomes(tmp_path), DataError) > 20
