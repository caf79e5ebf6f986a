"""The readers that `tests.fuzz` tries: where their good inputs come from, how those are bent, and
what reads them."""

import contextlib
import io
import json
import os
import random
import tarfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

from kernels.choices import Choice, Key, Rival
from kernels.store import Store
from models import build_model
from profiling.profile_files import read_profile
from profiling.suite import read_outcomes
from profiling.traces import read_chrome
from tests.mutations import bend_bytes, bend_json, bend_lines, bend_value, bend_words
from train import checkpoint, export, predict, run
from train.data import open_photos
from train.data.known import Known
from train.data.photos import decode
from train.data.relabel import relabel
from train.data.split_file import read_split, split_csv
from train.doctor.__main__ import diagnosed
from train.doctor.diagnose import told
from train.doctor.section import add_section
from train.doctor.signals import load
from train.page import Page
from train.predictor import FILE_KEYS, digest_of, load_trained, onnx_digests
from train.profile_section import add_profile
from train.study.claims import claim
from train.study.command import model_flags
from train.study.command import remember as remember_study
from train.study.comparing import model_statistics
from train.study.measure import measure
from train.study.results import read_run, results_csv
from train.transfer import read_weights, take_over

CPU = torch.device("cpu")
PHOTOS = ("a.jpg", "b b.jpg", "c.png", "deep/d.jpg", "e,e.jpg", "f;.gif")
WORDS = (b",", b";", b'"', b"\n", b"\r\n", b"\t", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b" ", b"../")


@dataclass(frozen=True)
class Reader:
    """mutate: a random generator -> an input. read: reads it, or raises."""

    name: str
    mutate: Callable[[random.Random], Any]
    read: Callable[[Any], Any]


def run_folder(folder: Path) -> Path:
    """A finished and measured run of two epochs on drawn photos."""
    flags = (
        "--data synthetic --limit 40 --model micro_resnet --image-size 32 --epochs 2 --threads 1"
    )
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        run.train(run.parse([*flags.split(), "--out", str(folder)]), "python -m train.run")
        measure(folder, None)
    return folder


def _photo_set(folder: Path) -> Path:
    for number, name in enumerate(PHOTOS):
        path = folder / "set" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]))
    (folder / "secret.jpg").write_bytes(b"outside")
    (folder / "set" / "train" / "link.jpg").symlink_to(folder / "secret.jpg")
    rows = "".join(f'"{name}",{"xy"[n % 2]}\n' for n, name in enumerate(PHOTOS))
    (folder / "set" / "train.csv").write_text("filename,label\n" + rows)
    return folder / "set"


def _written(path: Path, read: Callable[[], Any]) -> Callable[[bytes], Any]:
    """A reader of what is written to `path`."""

    def write_and_read(data: bytes) -> Any:
        path.write_bytes(data)
        return read()

    return write_and_read


# ---- tables


def table(folder: Path, _: Path) -> Reader:
    root = _photo_set(folder)
    good = (root / "train.csv").read_bytes()
    with_sides = good.replace(b"label\n", b"label,split\n").replace(b"x\n", b"x,val\n")
    goods = (good, with_sides.replace(b"y\n", b"y,train\n"), good.replace(b",", b";"))
    read = _written(root / "train.csv", partial(open_photos, str(root)))
    return Reader("table", lambda rng: bend_bytes(rng.choice(goods), rng, WORDS), read)


def split(folder: Path, _: Path) -> Reader:
    photos, path = open_photos(str(_photo_set(folder))), folder / "split.csv"
    good = split_csv((f, "xy"[n % 2], ("train", "val")[n % 2]) for n, f in enumerate(PHOTOS))
    read = _written(path, lambda: read_split(path, photos))
    return Reader("split", lambda rng: bend_bytes(good, rng, WORDS), read)


def relabels(folder: Path, _: Path) -> Reader:
    photos, path = open_photos(str(_photo_set(folder))), folder / "relabel.csv"
    good = b"filename,label,score\na.jpg,y,0.9\nc.png,,0.8\ndeep/d.jpg,y,0.1\n"
    read = _written(path, lambda: relabel(photos, path))
    return Reader("relabel", lambda rng: bend_bytes(good, rng, WORDS), read)


# ---- photos


def _pictures() -> list[bytes]:
    y, x = np.mgrid[0:24, 0:40]
    pixels = np.stack([6 * x, 10 * y, 255 - 6 * x], -1).astype(np.uint8)
    found = []
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, options in (
        ("JPEG", {"exif": exif}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("AVIF", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {}),
        ("PPM", {}),
    ):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind, **options)
        found.append(stream.getvalue())
    for mode in ("P", "RGBA", "I;16"):
        stream = io.BytesIO()
        Image.fromarray(pixels[..., 0] if mode == "I;16" else pixels).convert(mode).save(
            stream, "PNG"
        )
        found.append(stream.getvalue())
    return found


def photo(folder: Path, _: Path) -> Reader:
    goods, tokens = _pictures(), (b"\xff\xd8\xff\xe1", b"IDAT", b"\xff\xd9", b"\xff" * 8, bytes(64))
    path = folder / "photo"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        picture = decode(path, 16 if len(data) % 2 else None)
        assert picture.mode == "RGB"
        np.asarray(picture)

    return Reader("photo", lambda rng: bend_bytes(rng.choice(goods), rng, tokens), read)


def shards(folder: Path, _: Path) -> Reader:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number in range(4):
            for ending, content in (
                ("jpg", bytes([number]) * 9),
                ("json", json.dumps({"label": "xy"[number % 2]}).encode()),
            ):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    good, path = stream.getvalue(), folder / "s.tar"
    tokens = (b"ustar", b"../x.jpg\0", b"\0" * 512, b"7777777", b"g", b"L", b"x", b"2")

    def mutate(rng: random.Random) -> bytes:
        data = bytearray(bend_bytes(good, rng, tokens))
        if rng.random() < 0.7:  # with checksums that fit, so that what is behind them is read
            for start in range(0, len(data) - 511, 512):
                if data[start + 257 : start + 262] == b"ustar":
                    header = data[start : start + 148] + b" " * 8 + data[start + 156 : start + 512]
                    data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        return bytes(data)

    return Reader("shards", mutate, _written(path, partial(open_photos, f"shards:{path}")))


def food101(folder: Path, _: Path) -> Reader:
    for number in range(4):
        path = folder / "images" / "xy"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]))
    (folder / "meta").mkdir()
    good = json.dumps({"x": ["x/0", "x/2"], "y": ["y/1", "y/3"]}).encode()
    (folder / "meta" / "test.json").write_bytes(b"{}")
    path = folder / "meta" / "train.json"
    read = _written(path, partial(open_photos, f"food101:{folder}"))
    return Reader("food101", partial(bend_json, good), read)


# ---- weights


def sealed(folder: Path, run: Path) -> Reader:
    """A checkpoint's bytes; half of the inputs with a SHA-256 that fits the damage."""
    stream = io.BytesIO()
    state = {"weights": {"w": torch.arange(40.0)}, "history": [{"loss": 1.0}], "config": {}}
    torch.save({"schema": checkpoint.SCHEMA, **state}, stream)
    inner, path = stream.getvalue(), folder / "last.pt"
    good = checkpoint.sealed(inner)

    def mutate(rng: random.Random) -> tuple[bytes, bool]:
        if rng.random() < 0.5:
            return bend_bytes(good, rng), True
        return checkpoint.sealed(
            bend_bytes(inner, rng, (b"c", b"posix\nsystem\n", b"R", b"."))
        ), False

    def read(case: tuple[bytes, bool]) -> None:
        data, by_damage = case
        path.write_bytes(data)
        found = checkpoint.load(path)
        assert data == good or not by_damage, "damage was not noticed"
        assert isinstance(found, dict)

    return Reader("sealed", mutate, read)


def trained(folder: Path, run: Path) -> Reader:
    """A checkpoint with a SHA-256 that fits and another content, under each of its readers."""
    state = checkpoint.load(run / "checkpoints" / "best.pt")
    small = {key: state[key] for key in ("schema", "weights", "config", "classes", "temperature")}
    (folder / "checkpoints").mkdir()
    path = folder / "checkpoints" / "last.pt"
    readers = (
        lambda: load_trained(folder, CPU, None),
        lambda: export.load_source(folder),
        lambda: run_parse(["--resume", str(folder)]),
    )

    def mutate(rng: random.Random) -> tuple[Any, int]:
        key = rng.choice(("config", "config", "classes", "temperature", "weights", ""))
        bent = small | {key: bend_value(small[key], rng)} if key else bend_value(small, rng)
        return bent, rng.randrange(len(readers))

    def read(case: tuple[Any, int]) -> None:
        stream = io.BytesIO()
        torch.save(case[0], stream)
        path.write_bytes(checkpoint.sealed(stream.getvalue()))
        readers[case[1]]()

    return Reader("trained", mutate, read)


def safetensors(folder: Path, run: Path) -> Reader:
    path = folder / "model.safetensors"
    export.export_safetensors(export.load_source(run), path)
    with safe_open(path, framework="pt") as file:
        metadata, weights = file.metadata(), {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
    good = path.read_bytes()
    intact = load_trained(path, CPU, None)
    expected = {name: value.clone() for name, value in intact.model.state_dict().items()}

    def mutate(rng: random.Random) -> tuple[bytes, bool]:
        if rng.random() < 0.5:
            return bend_bytes(good, rng), True
        bent = dict(metadata)
        key = rng.choice(FILE_KEYS)
        if key == "config":
            bent[key] = json.dumps(bend_value(json.loads(bent[key]), rng))
        else:
            bent[key] = bend_json(bent[key].encode(), rng).decode("latin1")
        return save(weights, bent | {"sha256": digest_of(weights, bent)}), False

    def read(case: tuple[bytes, bool]) -> None:
        data, by_damage = case
        path.write_bytes(data)
        found = load_trained(path, CPU, None)
        if by_damage:
            assert found.classes == intact.classes
            assert found.config == intact.config
            for name, value in found.model.state_dict().items():
                assert torch.equal(value, expected[name]), "damage was not noticed"

    return Reader("safetensors", mutate, read)


def onnx_program(folder: Path, run: Path) -> Reader:
    """An exported program, damaged; half of the inputs with a SHA-256 that fits."""
    path, source = folder / "model.onnx", export.load_source(run)
    export.export_onnx(source, path)
    good, program, metadata = path.read_bytes(), onnx.load(path), source.metadata()
    named, _ = onnx_digests(good)

    def mutate(rng: random.Random) -> tuple[bytes, bool]:
        kind = rng.random()
        if kind < 0.5:
            return bend_bytes(good, rng), True
        if kind < 0.75:
            return export.sealed_onnx(bend_bytes(good, rng), named), False
        key = rng.choice(FILE_KEYS)
        bent = metadata | {key: bend_json(metadata[key].encode(), rng).decode("latin1")}
        onnx.helper.set_model_props(program, bent | {"sha256": named})
        return export.sealed_onnx(program.SerializeToString(), named), False

    def read(case: tuple[bytes, bool]) -> None:
        data, by_damage = case
        path.write_bytes(data)
        load_trained(path, CPU, None)
        assert data == good or not by_damage, "damage was not noticed"

    return Reader("onnx", mutate, read)


def weights(folder: Path, run: Path) -> Reader:
    """Files of others, for --init-from: .pth and .safetensors."""
    model = build_model("micro_resnet", 3)
    state = model.state_dict()
    goods = []
    for legacy in (False, True):
        stream = io.BytesIO()
        torch.save(state, stream, _use_new_zipfile_serialization=not legacy)
        goods.append((".pth", stream.getvalue()))
    goods.append((".safetensors", save(state)))

    def mutate(rng: random.Random) -> tuple[str, bytes]:
        ending, data = rng.choice(goods)
        return ending, bend_bytes(data, rng, (b"posix\nsystem\n", b"R", b"}", b"\xff" * 8))

    def read(case: tuple[str, bytes]) -> None:
        path = folder / f"weights{case[0]}"
        path.write_bytes(case[1])
        take_over(model, read_weights(path), str(path))

    return Reader("weights", mutate, read)


# ---- JSON


def signals(folder: Path, run: Path) -> Reader:
    """signals.jsonl as the doctor and a report read it; doctor.json beside it."""
    goods = {name: (run / name).read_bytes() for name in ("signals.jsonl", "doctor.json")}
    findings = [dict(one) for one in json.loads(goods["doctor.json"])] or [{"rule": "x"}]
    goods["doctor.json"] = json.dumps(findings).encode()

    bare = _without_checksums(goods["signals.jsonl"])

    def mutate(rng: random.Random) -> tuple[str, bytes]:
        if rng.random() < 0.2:
            return "doctor.json", bend_json(goods["doctor.json"], rng)
        return "signals.jsonl", bend_lines(rng.choice((bare, goods["signals.jsonl"])), rng)

    def read(case: tuple[str, bytes]) -> None:
        for name, data in (goods | {case[0]: case[1]}).items():
            (folder / name).write_bytes(data)
        told(diagnosed(folder, load(folder)))
        with contextlib.suppress(Exception):  # as the report does, which goes on with a note
            add_section(Page("page", ""), folder)

    return Reader("signals", mutate, read)


def _without_checksums(data: bytes) -> bytes:
    """JSON or JSON lines as another program would have written them."""
    lines = [data] if data.startswith(b"{\n") else data.splitlines()
    objects = [json.loads(line) for line in lines]
    for one in objects:
        del one["crc32"]
    return b"\n".join(json.dumps(one).encode() for one in objects) + b"\n"


def study(folder: Path, run: Path) -> Reader:
    """What a study reads of its runs."""
    names = ("summary.json", "measures.json", "metrics.jsonl", "validation.csv", "split.csv")
    names += ("pictures.json",)
    goods = {name: (run / name).read_bytes() for name in names}

    def mutate(rng: random.Random) -> tuple[str, bytes]:
        name = rng.choice(names)
        bend = {".json": bend_json, ".jsonl": bend_lines}.get(Path(name).suffix, bend_bytes)
        bare = rng.random() < 0.5 and Path(name).suffix != ".csv" and name != "pictures.json"
        return name, bend(_without_checksums(goods[name]) if bare else goods[name], rng)

    def read(case: tuple[str, bytes]) -> None:
        for name, data in (goods | {case[0]: case[1]}).items():
            (folder / name).write_bytes(data)
        found = read_run("micro_resnet-seed0", folder)
        results_csv([found])
        if found.summary:
            model_statistics([found])

    return Reader("study", mutate, read)


def remembered(folder: Path, _: Path) -> Reader:
    """study.json, a claim, and what is kept between runs: known.json and plans.json."""
    settings = {"data": "synthetic", "recipe": "default", "folds": None, "flags": ["--epochs", "2"]}
    place = dict.fromkeys(("gpu", "driver", "torch", "triton", "cudnn", "source"), "x")
    key = Key(what="conv", dtype="float32", multiprocessors=1, **place)
    store = Store(folder, folder / "none")
    store.add(Choice(key, "a", "b", {n: Rival(2.0, 1.0, 3.0) for n in "ab"}, "faster"))
    for name in ("study.json", "job.1"):
        (folder / name).write_text("{}")
    known = Known("photos", folder)
    status = os.stat(folder)
    known.put("a.jpg", status, "0" * 64, own=True)
    known.save()
    (table,) = folder.glob("*.known.json")
    holder = {"host": "elsewhere", "pid": 1, "started": "1"}
    cases = {
        "study.json": (json.dumps(settings).encode(), lambda: remember_study(folder, settings)),
        "job.1": (json.dumps(holder).encode(), lambda: claim(folder, "job")),
        table.name: (table.read_bytes(), lambda: Known("photos", folder).get("a.jpg", status)),
        "plans.json": (store.path.read_bytes(), lambda: Store(folder, folder / "none").read()),
        "steps.json": (_STEPS, lambda: read_outcomes(folder)),
        "trace.json": (_TRACE, lambda: read_chrome(folder / "trace.json")),
        "profile.json": (
            _PROFILE,
            lambda: (add_profile(Page("", ""), folder), read_profile(folder)),
        ),
    }

    def mutate(rng: random.Random) -> tuple[str, bytes]:
        name = rng.choice(tuple(cases))
        return name, bend_json(cases[name][0], rng)

    def read(case: tuple[str, bytes]) -> None:
        (folder / case[0]).write_bytes(case[1])
        cases[case[0]][1]()

    return Reader("remembered", mutate, read)


_ROW = {"path": ["step"], "shape": "", "share": 1.0, "device": 9, "gaps": 1, "host": 9}
_ROW |= {"kernels": 2, "top": [["k", 1, 9]]}
_PROFILE = json.dumps({"source": "x", "device": "GPU", "steps": 3, "rows": [_ROW]}).encode()
_STEPS = json.dumps({"numerics": {"status": "ok", "seconds": 2.5, "detail": {"x": "y"}}}).encode()
_EVENT = {"ph": "X", "cat": "cpu_op", "name": "conv", "tid": 1, "ts": 2, "dur": 3, "args": {}}
_STEP = _EVENT | {"cat": "user_annotation", "name": "lapis:step", "dur": 9}
_TRACE = json.dumps({"traceEvents": [_STEP, _EVENT]}).encode()


# ---- command lines


def run_parse(words: Sequence[str]) -> Any:
    return run.parse(list(words))


def command(folder: Path, run: Path) -> Reader:
    """Flags of train.run up to where training begins, and of the commands with argparse."""
    (folder / "split.csv").write_bytes((run / "split.csv").read_bytes())
    lines = (
        "--data synthetic --model resnet34 --epochs 3 --lr 0.1 --fused",
        "--recipe report --fold 1 --folds 5 --image-size 64 --width 1.5 --se",
        f"--split {folder / 'split.csv'} --mixup 0.2 --optimizer adamw --classes a b",
        "--init-from x.pth --layer-decay 0.5 --clip-grad 1 --norm group",
    )
    goods = [line.split() for line in lines]
    others = (
        lambda words: predict.parser().parse_args(["--checkpoint", "x", *words]),
        lambda words: [model_flags(word) for word in words],
    )

    def mutate(rng: random.Random) -> tuple[int, list[str]]:
        kind = rng.randrange(4)
        if kind == 0:
            return 0, bend_words(["a.jpg", "--json", "x.json", "--top-k", "3", "--amp", "off"], rng)
        if kind == 1:
            return 1, bend_words(["resnet34+se+norm=group", "plain18+act=gelu+width=2"], rng)
        return 2, bend_words(rng.choice(goods), rng)

    def read(case: tuple[int, list[str]]) -> None:
        (*others, run_parse)[case[0]](case[1])

    return Reader("command", mutate, read)


# name -> (share of all inputs, makes the reader in a folder, from a finished run)
READERS: dict[str, tuple[float, Callable[[Path, Path], Reader]]] = {
    "table": (12, table),
    "split": (12, split),
    "relabel": (10, relabels),
    "photo": (25, photo),
    "shards": (10, shards),
    "food101": (4, food101),
    "sealed": (8, sealed),
    "trained": (1, trained),
    "safetensors": (2, safetensors),
    "onnx": (1, onnx_program),
    "weights": (4, weights),
    "signals": (4, signals),
    "study": (4, study),
    "remembered": (4, remembered),
    "command": (1.5, command),
}
