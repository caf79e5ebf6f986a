"""The house rules: which way imports point, and that packaging says what the code does."""

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
OURS = ("kernels", "models", "train", "profiling")
ALLOWED = {
    "kernels": (),
    "models": ("kernels", "profiling.nvtx"),
    "train": ("models", "kernels", "profiling.nvtx"),
    "profiling": ("train", "models", "kernels"),
    # both are loaded by `import profiling.nvtx`, so they may lead nowhere
    "profiling/nvtx.py": (),
    "profiling/__init__.py": (),
}
DISTRIBUTION = {"PIL": "pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn"}
COMMANDS = [
    "pip install -e . -c constraints.txt && python -m train.run --model resnet34 --fused",
    "pip install -e '.[test]' -c constraints.txt && python -m pytest",
]


def imports(source: str, package: str) -> Iterator[tuple[str, bool]]:
    """Every imported module as a dotted name, and whether that happens when the file is loaded.

    `from a import b` counts as `a.b`, for `b` may be a module; relative ones are made absolute.
    """
    tree = ast.parse(source)
    lazy = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in lazy
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            parts = [*(base if node.level else ()), *filter(None, [node.module])]
            for alias in node.names:
                yield ".".join([*parts, alias.name]), node not in lazy


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def found(path: Path) -> list[tuple[str, bool]]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return list(imports(path.read_text(encoding="utf-8"), package))


def wrong_ways(path: str, names: list[str]) -> list[str]:
    """Those of the imported `names` that a file at `path` may not import."""
    room = path.split("/")[0]
    allowed = ALLOWED.get(path, (*ALLOWED[room], room))
    return [
        name
        for name in names
        if name.split(".")[0] in (*OURS, "tests")
        and not any(name == way or name.startswith(f"{way}.") for way in allowed)
    ]


def setup_arguments() -> dict:
    """The keyword arguments of setup(), by running setup.py with a setuptools that only listens."""
    heard = {}
    listener = types.SimpleNamespace(setup=lambda **arguments: heard.update(arguments))
    with mock.patch.dict(sys.modules, setuptools=listener):
        exec((ROOT / "setup.py").read_text(encoding="utf-8"), {"__name__": "__main__"})
    return heard


def names(requirements: list[str]) -> set[str]:
    return {Requirement(text).name.lower().replace("_", "-") for text in requirements}


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*,]+", str(item.specifier)) for item in pinned)
    table = {item.name.lower().replace("_", "-"): item for item in pinned}
    assert len(table) == len(pinned)
    return table


def fenced_lines(readme: str) -> list[str]:
    """Commands of all code fences, in order, without prompts, comments and blank lines."""
    blocks = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", readme, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


# Imports


def test_imports_point_the_right_way():
    wrong = {
        str(path.relative_to(ROOT)): ways
        for path in files(*OURS)
        if (ways := wrong_ways(path.relative_to(ROOT).as_posix(), [n for n, _ in found(path)]))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("kernels/a.py", "import torch, models", ["models"]),
        ("kernels/a.py", "from kernels.spec import KernelSpec\nfrom . import launch", []),
        ("models/a.py", "def f():\n    from train import page", ["train.page"]),
        ("models/a.py", "from kernels import add_relu", []),
        ("models/a.py", "from profiling import nvtx, rows", ["profiling.rows"]),
        ("kernels/a.py", "from profiling import nvtx", ["profiling.nvtx"]),
        ("train/a.py", "import profiling.timing", ["profiling.timing"]),
        ("train/a.py", "from profiling import nvtx, timing", ["profiling.timing"]),
        ("train/data/a.py", "from ..page import Page\nfrom ...models import x", []),
        ("train/a.py", "import tests.helpers", ["tests.helpers"]),
        ("profiling/nvtx.py", "from profiling.timing import x", ["profiling.timing.x"]),
        ("profiling/timing.py", "import train.run, models, kernels, profiling.nvtx", []),
        ("train/a.py", "import modelset, kernels_of_others", []),
    ],
)
def test_the_rule_itself(path, source, wrong):
    package = path.rpartition("/")[0].replace("/", ".")
    assert wrong_ways(path, [name for name, _ in imports(source, package)]) == wrong


# Packaging


def test_setup_lists_exactly_our_packages():
    folders = {".".join(path.relative_to(ROOT).parent.parts) for path in files(*OURS)}
    packages = setup_arguments()["packages"]
    assert sorted(packages) == sorted(folders)
    for package in packages:
        assert (ROOT / package.replace(".", "/") / "__init__.py").is_file()


def test_every_import_is_declared():
    arguments = setup_arguments()
    always = names(arguments["install_requires"])
    extras = arguments["extras_require"]
    some = always.union(*map(names, extras.values()))
    missing = []
    for path in files(*OURS, "tests"):
        tested = path.is_relative_to(ROOT / "tests")
        for name, loaded in found(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in (*OURS, "tests", "docs"):
                continue
            declared = always | names(extras["test"]) if tested else always if loaded else some
            if DISTRIBUTION.get(top, top).lower().replace("_", "-") not in declared:
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert missing == []


def test_constraints_pin_every_declared_dependency_within_its_range():
    arguments = setup_arguments()
    extras = arguments["extras_require"].values()
    texts = [*arguments["install_requires"], *itertools.chain.from_iterable(extras)]
    table = pins()
    for requirement in map(Requirement, texts):
        pin = table[requirement.name.lower().replace("_", "-")]
        (version,) = [part.version for part in pin.specifier]
        assert requirement.specifier.contains(version), f"{pin} is outside of {requirement}"
    assert {str(table[name]) for name in ("torch", "torchvision", "triton", "nvtx")} == {
        "torch==2.11.0",
        "torchvision==0.26.0",
        "triton==3.6.0",
        "nvtx==0.2.11",
    }


def test_the_distribution_cannot_be_uploaded_and_triton_is_for_linux():
    arguments = setup_arguments()
    assert (arguments["name"], arguments["version"]) == ("lapis", "0.1.0")
    assert arguments["python_requires"] == ">=3.11,<3.15"
    assert "Private :: Do Not Upload" in arguments["classifiers"]
    table = {item.name: item for item in map(Requirement, arguments["install_requires"])}
    assert table["triton"].marker.evaluate({"sys_platform": "linux"})
    assert not table["triton"].marker.evaluate({"sys_platform": "darwin"})
    assert not table["triton"].marker.evaluate({"sys_platform": "win32"})


# README and CI


def test_readme_starts_with_the_two_commands():
    commands = fenced_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    assert commands[:2] == COMMANDS


def show(root: Path) -> subprocess.CompletedProcess:
    command = ["bash", str(root / ".ci" / "run"), "--show"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


@pytest.fixture
def ci(tmp_path):
    """A copy of .ci/run in an otherwise empty checkout, as a function of the README's text."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")

    def with_readme(text: str) -> subprocess.CompletedProcess:
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        return show(tmp_path)

    return with_readme


def test_ci_runs_the_line_of_the_readme():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    result = show(ROOT)
    assert (result.stdout, result.stderr) == (COMMANDS[1] + "\n", "")


def test_ci_finds_the_line_in_one_fence_or_two(ci):
    apart = f"Hi\n```bash\n{COMMANDS[0]}\n```\nor\n```\n{COMMANDS[1]}\n```\npython -m pytest\n"
    together = f"```bash\n# all\n{COMMANDS[0]}\n\n{COMMANDS[1]}\n```\n"
    assert ci(apart).stdout == COMMANDS[1] + "\n"
    assert ci(together).stdout == COMMANDS[1] + "\n"


@pytest.mark.parametrize(
    ("readme", "count"),
    [
        (f"```\n{COMMANDS[0]}\n```\n", 0),
        (f"{COMMANDS[1]}\n", 0),
        (f"```\n{COMMANDS[1]}\n{COMMANDS[1]}\n```\n", 2),
    ],
)
def test_ci_is_loud_when_there_is_not_exactly_one_line(ci, readme, count):
    result = ci(readme)
    assert result.returncode == 1
    assert result.stdout == ""
    assert f"README.md has {count} fenced lines" in result.stderr
