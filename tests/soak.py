"""Half an hour of trainings, stopped, killed and resumed under a memory limit: does anything grow?

    python -m tests.soak --minutes 30 --out FILE.json

One process trains without end: every run is stopped by SIGTERM at a random step, resumed and
finished in it, and then its resident memory, open files and threads are counted. Beside it other
runs are killed and resumed, and must end bit for bit like the undisturbed one. The limit is on the
address space, MEMORY beyond what is loaded.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from tests.forks import FLAGS, PLAIN, RICH, differences, end, final, fresh
from tests.kills import at_random
from train import run
from train.environment import versions
from train.loop import Listener
from train.record import write_json

MEMORY = 2**30  # bytes of address space beyond what is loaded
WARM_UP = 0.2  # of the samples, in which caches and the allocator's pools still fill
BLOCKS = 10  # means of neighbouring samples, which are not independent of each other
STEPS = 18  # of a whole run of FLAGS, at least


class StopAt(Listener):
    """Sends this process a SIGTERM behind its n-th step."""

    def __init__(self, steps: int):
        self.left = steps

    def step_ended(self, step):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def train_without_end(folder: Path, until: float, samples: Path, seed: int) -> None:
    """Train, stop, resume in this process until the time `until`; a line a round to `samples`:
    seconds, bytes resident, open files, threads."""
    rng, began = np.random.default_rng(seed), time.monotonic()
    page, number = resource.getpagesize(), 0
    with open(samples, "w", buffering=1) as stream:
        while time.monotonic() < until:
            place, stop = folder / f"round{number}", StopAt(int(rng.integers(1, STEPS)))
            words = [*FLAGS, *(PLAIN, RICH)[number % 2], "--out", str(place)]
            codes = run.main(words, watching=[stop]), run.main(["--resume", str(place)])
            if codes != (75, 0):
                raise SystemExit(f"round {number} ended with {codes}")
            shutil.rmtree(place)
            rss = page * int(Path("/proc/self/statm").read_text().split()[1])
            counts = [len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")]
            stream.write(json.dumps([round(time.monotonic() - began, 1), rss, *counts]) + "\n")
            number += 1


def kill_without_end(folder: Path, until: float, seed: int) -> Iterator[list[tuple[int, bool]]]:
    """Runs that are killed and go on until the time `until`; how their processes ended. Raises
    SystemExit where a run ends otherwise than the undisturbed one."""
    expected = []
    for name, flags in (("plain", PLAIN), ("rich", RICH)):
        if code := end(fresh(folder / name, *flags)):
            raise SystemExit(f"the undisturbed run ended with {code}")
        expected.append(final(folder / name))
    number = 0
    while time.monotonic() < until:
        place, rich = folder / f"killed{number}", number % 2
        ends = at_random(place, (PLAIN, RICH)[rich], np.random.default_rng((seed, number)))
        if ends[-1].code or differences(final(place), expected[rich]):
            raise SystemExit(f"killed run {number} ended otherwise: {ends}")
        shutil.rmtree(place)
        yield ends
        number += 1


def slope(seconds: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Growth an hour with its 95 % interval: least squares through means of neighbouring samples,
    behind the warm-up. Raises SystemExit where they are too few."""
    first = int(WARM_UP * len(values))
    if len(values) - first < BLOCKS:
        raise SystemExit(f"{len(values)} rounds are too few to see a slope: give more --minutes")
    x, y = (
        [float(np.mean(part)) for part in np.array_split(np.asarray(one[first:], float), BLOCKS)]
        for one in (seconds, values)
    )
    fit = stats.linregress(np.array(x) / 3600, y)
    width = float(stats.t.ppf(0.975, BLOCKS - 2) * fit.stderr)
    return {
        "an_hour": float(fit.slope),
        "low": float(fit.slope) - width,
        "high": float(fit.slope) + width,
    }


def soak(minutes: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train and kill for so long; what FILE gets. Raises SystemExit where anything failed."""
    os.environ["LAPIS_CACHE"] = str(folder / "cache")
    loaded = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (loaded + MEMORY, resource.RLIM_INFINITY))
    samples, until = folder / "samples.jsonl", time.monotonic() + 60 * minutes
    trainer = os.fork()
    if trainer == 0:
        try:
            for number in (1, 2):
                os.dup2(os.open(folder / "said", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
            train_without_end(folder, until, samples, seed)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    killed = list(tqdm(kill_without_end(folder, until, seed), unit=" killed runs", mininterval=10))
    if code := end(trainer):
        raise SystemExit(f"the trainer ended with {code}: {(folder / 'said').read_text()[-2000:]}")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    seconds, rss, files, threads = (list(column) for column in zip(*rows, strict=True))
    ends = [one for run in killed for one in run]
    return {
        "minutes": minutes,
        "seed": seed,
        "limit_bytes": MEMORY,
        "rounds": len(rows),
        "killed_runs": len(killed),
        "kills": sum(code == -signal.SIGKILL for code, _ in ends),
        "stops": len(rows) + sum(code == 75 for code, _ in ends),
        "resident_bytes": {
            "first": rss[0],
            "last": rss[-1],
            "most": max(rss),
            **slope(seconds, rss),
        },
        "open_files": {"first": files[0], "last": files[-1], "most": max(files)},
        "threads": {"first": threads[0], "last": threads[-1], "most": max(threads)},
        "versions": versions(),
        "samples": {"seconds": seconds, "resident_bytes": rss, "open_files": files},
    }


def main() -> int:
    """Soak as the flags say; exit code 1, with a sentence, where anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(options.minutes, options.seed, Path(folder))
    write_json(options.out, found)
    memory, files = found["resident_bytes"], found["open_files"]
    print(
        f"{found['rounds']} rounds, {found['stops']} stops, {found['kills']} kills; resident memory"
        f" {memory['an_hour'] / 2**20:+.1f} MiB an hour ({memory['low'] / 2**20:+.1f} to"
        f" {memory['high'] / 2**20:+.1f}), open files {files['first']} to {files['last']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
