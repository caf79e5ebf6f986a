"""What leaves this machine: nothing. No command connects to anything, no output has a photo's
metadata, and pages load nothing and run nothing that a file or class name says."""

import base64
import html.parser
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.config import Config
from train.transfer import start_from

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("<script>alert('soto')</script>", '"><img src=x onerror=alert(1)>')
PLACE = "7.7956S 110.3695E Yogyakarta"
# loaded by every Python below, also by the processes of a study
HOOK = """
import os, sys

def look(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        reach(f"{event} {args}")
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"):
        if not isinstance(args[1], (str, bytes)):  # the address of AF_UNIX is a path
            reach(f"{event} {args[1]}")

def reach(what):
    with open(os.environ["LAPIS_TEST_REACHED"], "a") as file:
        file.write(what + "\\n")
    raise OSError("no network in this test")

sys.addaudithook(look)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """train.csv + train/: JPEGs that say where they were taken, one of them upside down."""
    root = tmp_path_factory.mktemp("photos")
    (root / "train").mkdir()
    rng, rows = np.random.default_rng(0), ["filename,label"]
    for number in range(24):
        exif = Image.Exif()
        exif[0x0112] = 3 if number == 5 else 1
        exif[0x010E] = PLACE
        exif.get_ifd(0x8825).update({1: "S", 2: (7.0, 47.0, 44.2), 28: PLACE.encode()})
        pixels = rng.normal(90 + 80 * (number % 2), 60, (40, 48, 3)).clip(0, 255)
        name = f"<img src=x onerror=alert({number})>.jpg"
        Image.fromarray(pixels.astype(np.uint8)).save(root / "train" / name, exif=exif)
        assert PLACE.encode() in (root / "train" / name).read_bytes()
        quoted = [f'"{cell}"' for cell in (name, CLASSES[number % 2].replace('"', '""'))]
        rows.append(",".join(quoted))
    (root / "train.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def outputs(photos, tmp_path_factory) -> Path:
    """What all commands leave, run one after another where nothing can be connected to."""
    out = tmp_path_factory.mktemp("outputs")
    hook = tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(HOOK)
    training = ["--data", str(photos), "--model", "micro_resnet", "--image-size", "32"]
    training += ["--epochs", "1", "--batch-size", "8"]
    run, trained = str(out / "run"), ["--checkpoint", str(out / "run"), "--threads", "1"]
    one = ["--models", "micro_resnet", "--seeds", "1", *training[:2], *training[4:]]
    commands = [
        ["train.data.check", str(photos), "--out", str(out / "check")],
        ["train.run", *training, "--threads", "1", "--out", run],
        ["train.run", "--resume", run],
        ["train.doctor", run, "--html", str(out / "doctor.html")],
        ["train.predict", *trained, str(photos / "train"), "--cam", str(out / "cam")],
        ["train.predict", *trained, str(photos / "train"), "--json", str(out / "p.json")],
        ["train.evaluate", *trained, "--data", str(photos), "--out", str(out / "evaluation")],
        ["train.export", "--checkpoint", run, "--out", str(out / "model.safetensors")],
        ["train.study", *one, "--threads", "1", "--out", str(out / "study")],
    ]
    program = (
        "import importlib, json, sys\n"
        "for module, *words in json.loads(sys.argv[1]):\n"
        "    name = 'train.study.command' if module == 'train.study' else module\n"
        "    name = 'train.doctor.__main__' if module == 'train.doctor' else name\n"
        "    code = importlib.import_module(name).main(words)\n"
        "    print(module, code, flush=True)\n"
    )
    place = {
        "PYTHONPATH": os.pathsep.join([str(hook), str(ROOT)]),
        "LAPIS_TEST_REACHED": str(out / "reached.txt"),
        "LAPIS_CACHE": str(out / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(commands)],
        cwd=out,
        env={**os.environ, **place},
        capture_output=True,
        text=True,
        check=False,
    )
    ended = re.findall(r"^(train\.[a-z.]+) (\d+)$", done.stdout, re.MULTILINE)
    assert ended == [(words[0], "0") for words in commands], done.stderr
    return out


def test_nothing_is_connected_to(outputs):
    assert not (outputs / "reached.txt").exists()
    assert (outputs / "study" / "report.html").exists()


def test_the_hook_sees_a_connection(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    program = "import socket; socket.create_connection(('127.0.0.1', 9))"
    place = {"PYTHONPATH": str(tmp_path), "LAPIS_TEST_REACHED": str(tmp_path / "reached")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **place},
        capture_output=True,
        check=False,
    )
    assert b"no network in this test" in done.stderr
    assert "socket.getaddrinfo" in (tmp_path / "reached").read_text()


def test_no_output_has_a_photos_metadata(outputs):
    seen = 0
    for path in outputs.rglob("*"):
        if not path.is_file():
            continue
        content = path.read_bytes()
        inlined = re.findall(rb"data:image/[a-z]+;base64,([A-Za-z0-9+/=]+)", content)
        for data in (content, *map(base64.b64decode, inlined)):
            for trace in (PLACE.encode(), b"Exif\0\0", b"eXIf"):
                assert trace not in data, path
            if data is not content or path.suffix in (".png", ".jpg"):
                with Image.open(io.BytesIO(data)) as picture:
                    assert not dict(picture.getexif())
                seen += 1
    assert seen > 30


class Page(html.parser.HTMLParser):
    """Tags, and the addresses that a browser would load or a click would follow."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.addresses, self.handlers = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster", "background"):
                self.addresses.append(value)
            if name.startswith("on"):
                self.handlers.append((tag, name))


def test_pages_escape_names_and_load_nothing(outputs):
    pages = {path.relative_to(outputs).as_posix(): path for path in outputs.rglob("*.html")}
    assert {"run/report.html", "study/report.html", "doctor.html"} <= pages.keys()
    assert len(pages) >= 5
    named = 0
    for name, path in pages.items():
        text = path.read_text(encoding="utf-8")
        found = Page(text)
        assert "Content-Security-Policy" in text, name
        assert found.handlers == [], name
        assert all(a.startswith(("data:", "#")) for a in found.addresses), name
        for word in ("<script>alert", "<img src=x", "@import", "url(http", "url(//"):
            assert word not in text, name
        assert not set(found.tags) & {"iframe", "object", "embed", "base", "form"}, name
        named += "&lt;script&gt;alert(" in text
    assert named >= 4


def test_weights_are_downloaded_only_where_they_are_asked_for(monkeypatch):
    def reach(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", reach)
    assert start_from(None, Config()) is None
