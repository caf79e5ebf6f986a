"""Every block of code in README.md and docs/ is run, on photos and runs made here and small; what
cannot run here is named with the reason, and its flags go through the program's own parser."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from train import flags
from train.arguments import Parser
from train.study import command as study

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SMALL = {
    "--model": "micro_resnet",
    "--epochs": "1",
    "--image-size": "32",
    "--val-scale": "1",
    "--batch-size": "8",
    "--threads": "1",
}
# by how the line begins
NOT_RUN = {
    "pip install": "installs: .ci/run does what it says, in an environment of its own",
    "torchrun": "several processes: tests/test_distributed.py",
    "python -m profiling.nsys": "wants Nsight Systems, else minutes: tests/test_nsys.py",
    "python -m profiling.suite": "takes minutes: tests/test_suite.py",
    "python -m train.study": "takes minutes: tests/test_study.py",
}


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def lines() -> list[str]:
    """Every command of every page, in order, a line each."""
    found = [
        line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()
    ]
    return [line for line in found if line.strip()]


def not_run(line: str) -> bool:
    return any(line.startswith(start) for start in NOT_RUN)


def small(words: list[str], out: Path) -> list[str]:
    """The flags of `train.run`, with the sizes of `SMALL` in place of their own."""
    kept, rest = [], iter(words)
    for word in rest:
        if word in SMALL:
            next(rest)
        else:
            kept.append(word)
    sizes = [item for pair in SMALL.items() for item in pair]
    return [*kept, *sizes, "--out", str(out)]


@pytest.fixture(scope="module")
def tour():
    """examples/tour.py as a module."""
    spec = importlib.util.spec_from_file_location("tour", ROOT / "examples" / "tour.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps(place: Path) -> list[list[str]]:
    """All that can be run, as `tests.readme_steps` takes it, with what it makes in `place`."""
    results = ROOT / "profiling" / "results" / "h100"
    places = {
        "PATH": place / "photos",
        "SUITE_DIR": results,
        "OTHER_SUITE": results,
        **{name: place / name for name in ("RUN_DIR", "OTHER_RUN", "CHECK_DIR")},
    }
    data = ["--data", str(places["PATH"])]
    found = [["train.run", *small(data, places["OTHER_RUN"])]]
    for line in lines():
        if not_run(line):
            continue
        for name, path in places.items():
            line = re.sub(rf"\b{name}\b", str(path), line)
        python, _, module, *words = shlex.split(line, comments=True)
        assert python == "python"
        if module in ("train.run", "train.lr_find") and "--resume" not in words:
            first = not any(str(places["RUN_DIR"]) in step for step in found)
            out = places["RUN_DIR"] if first else place / f"out{len(found)}"
            words = small(words, out if module == "train.run" else out.with_suffix(".png"))
        if module == "profiling.train_profile":
            words = ["--skip", "1", "--steps", "1", "--", *small(words[1:], place / "profiled")]
        found.append([module, *words])
    found += [["python", code] for page in PAGES for code in blocks(page, "python")]
    return [*found, ["tour"]]


@pytest.fixture(scope="module")
def done(tour, tmp_path_factory) -> list[tuple[str, int, str]]:
    """What was run, its exit code, and all that was printed."""
    place = tmp_path_factory.mktemp("readme")
    tour.draw(place / "photos", of_each=6)
    every = steps(place)
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.readme_steps", json.dumps(every)],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    ended = re.findall(r"^== (\d+) ended with (\d+) after (\d+) s$", ran.stdout, re.MULTILINE)
    assert len(ended) == len(every), ran.stdout + ran.stderr
    return [(shlex.join(every[int(n)]), int(code), ran.stdout + ran.stderr) for n, code, _ in ended]


@pytest.mark.timeout(600)
def test_every_block_runs(done):
    wrong = [what for what, code, _ in done if code != 0]
    assert not wrong, done[0][2]
    assert sum("train.predict" in what for what, *_ in done) >= 1


@pytest.mark.parametrize("line", [line for line in lines() if not_run(line)])
def test_what_is_not_run_is_parsed(line, tmp_path, monkeypatch):
    if line.startswith("pip install"):
        line = line.partition(" && ")[2]
    words = shlex.split(line, comments=True)
    module, words = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    if module == "pytest":
        return
    if module == "train.run":
        flags.parse(words)
    elif module == "train.study":
        monkeypatch.chdir(tmp_path)
        given, rest = study._parser().parse_known_args(words)
        assert study.grid(given, given.models.split(","), rest)[0]
    else:
        assert parsed(module, words)
        if "--" in words:
            flags.parse(words[words.index("--") + 1 :])


def parsed(module: str, words: list[str]) -> bool:
    """Whether the parser of a command takes the words."""

    class Taken(Exception):
        pass

    real = Parser.parse_args

    def parse(self, *arguments):
        real(self, *arguments)
        raise Taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", parse)
        with pytest.raises(Taken):
            importlib.import_module(module).main(words)
    return True


def test_every_reason_is_still_needed():
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in lines()), start


@pytest.mark.parametrize("name", ["own_resnet.py", "where_time_goes.py"])
@pytest.mark.timeout(300)
def test_examples_run(name, tmp_path):
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, ROOT / "examples" / name],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, target
