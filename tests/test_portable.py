"""What only Linux or POSIX has may be missing: every command still starts (Windows, macOS)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__main__")
    for room in ("train", "profiling")
    for path in (ROOT / room).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
# libraries are loaded before anything is hidden: they look after themselves
HIDE = """
import multiprocessing, os, runpy, signal, sys
import cv2, matplotlib.figure, numpy, PIL.Image, scipy.stats, torch, torchvision, tyro
import safetensors.torch, torch.utils.cpp_extension

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "sched_getaffinity", "killpg", "getpgid", "geteuid", "getuid"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGSTOP", "setitimer", "alarm"):
    delattr(signal, name)
multiprocessing.get_all_start_methods = lambda: ["spawn"]
"""


def hidden(code: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", HIDE + code, *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_every_command_is_imported_without_what_only_linux_has():
    assert {"train.run", "train.predict", "train.study.child"} <= {*COMMANDS}
    done = hidden(
        "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)", *COMMANDS
    )
    assert done.returncode == 0, done.stderr


def test_a_run_trains_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "cache"))
    words = ["--limit", "40", "--model", "micro_resnet", "--image-size", "32", "--epochs", "1"]
    words += ["--threads", "1", "--out", str(tmp_path / "run")]
    done = hidden("from train import run\nsys.exit(run.main(sys.argv[1:]))", *words)
    assert done.returncode == 0, done.stderr
