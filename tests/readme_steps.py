"""Runs commands and code one after another in one process, for tests/test_readme.py: each step is
[module, words ...], ["python", code] or ["tour"]."""

import importlib
import importlib.util
import json
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"train.study": "train.study.command", "train.doctor": "train.doctor.__main__"}


def main(steps: list[list[str]]) -> None:
    """Run all steps, saying how each ends."""
    for number, step in enumerate(steps):
        started = time.perf_counter()
        try:
            code = one(*step)
        except SystemExit as end:
            code = end.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
        seconds = time.perf_counter() - started
        print(f"\n== {number} ended with {code} after {seconds:.0f} s", flush=True)


def one(module: str, *words: str) -> int:
    """Run one step; its exit code."""
    if module == "python":
        exec(compile(words[0], "README.md", "exec"), {})
        return 0
    if module == "tour":
        return tour()
    return importlib.import_module(PLACES.get(module, module)).main(list(words))


def tour() -> int:
    """examples/tour.py with less to train, its commands in this process."""
    spec = importlib.util.spec_from_file_location("tour", ROOT / "examples" / "tour.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = "--image-size 32 --val-scale 1 --epochs 1 --threads 1"
    module.TRAIN = ("train.run", *sizes.split())
    codes, draw = [], module.draw
    module.draw = lambda folder, of_each: draw(folder, 6)
    module.run = lambda title, *words: codes.append(one(*map(str, words)))
    module.main()
    return max(codes)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
