"""Runs that are killed, go on, and end bit for bit like the run that nobody disturbed:

    python -m tests.kills --kills 200 --out FILE.json

First at every write boundary of every file, then at random moments, until so many SIGKILLs have hit
runs that had begun: had a config.json, and were resumed. Those killed earlier start again, and are
counted apart. FILE gets every run with its kills, and is written anew behind each; the same command
goes on where it ends.
"""

import argparse
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from tests.forks import FLAGS, PLAIN, RICH, differences, end, errors, final, fresh, go_on, wait_for
from train.environment import versions
from train.record import read_json, write_json

STAGES = ("opened", "written", "synced", "moved", "replaced")
FILES = (
    *("last.pt", "best.pt", "metrics.jsonl", "split.csv", "config.json", "summary.json"),
    *("doctor.json", "report.html", "curves.png"),
)
PASSES = (1, 2, 5)  # a point of a file is passed once a write of it
TIMES = 8  # a run is killed at random, in a record


class Ended(NamedTuple):
    """How a process of a run ended: its exit code, and whether the run had begun by then."""

    code: int
    begun: bool


def ended(folder: Path, child: int) -> Ended:
    """How `child`, which trains in `folder`, ends."""
    code = end(child)
    return Ended(code, (folder / "config.json").exists())


def at_boundary(folder: Path, flags: list[str], fault: str) -> list[Ended]:
    """Kill a run at the point `fault`, and let it end; one end only where the run never passes that
    point."""
    first = ended(folder, fresh(folder, *flags, fault=fault))
    return [first] if first.code == 0 else [first, ended(folder, go_on(folder, flags))]


def at_random(
    folder: Path,
    flags: list[str],
    rng: np.random.Generator,
    times: int = 3,
    longest: float = 2.5,
    stops: float = 0.3,
) -> list[Ended]:
    """So many times, unless it is done, kill a run at random within `longest` seconds, `stops` of
    the times by SIGTERM, then let it end; how its processes ended."""
    ends = []
    for _ in range(times):
        child = go_on(folder, flags)
        if rng.random() < 0.8:  # on a slow machine no moment would come behind its beginning
            wait_for((folder / "config.json").exists)
        time.sleep(rng.uniform(0.1, longest))
        os.kill(child, signal.SIGTERM if rng.random() < stops else signal.SIGKILL)
        ends.append(ended(folder, child))
        if ends[-1].code == 0:
            break
    return [*ends, ended(folder, go_on(folder, flags))]


def trials(seed: int) -> Iterator[tuple[str, list[str], str | np.random.Generator]]:
    """Name, flags, and the fault, or the generator of random moments, of each run to be killed."""
    for file in FILES:
        for stage in STAGES:
            for passes in PASSES:
                fault = f"{file}:{stage}:{passes}"
                yield fault, RICH, fault
    number = 0
    while True:
        name = ("plain", "rich")[number % 2]
        rng = np.random.default_rng((seed, number))
        yield f"random {number}, {name}", (PLAIN, RICH)[number % 2], rng
        number += 1


def record(kills: int, seed: int, out: Path, folder: Path) -> dict[str, Any]:
    """Kill runs until `kills` is reached; what FILE gets."""
    before = read_json(out) if out.exists() else {"seconds": 0, "commits": [], "runs": []}
    runs = [{**one, "ends": [Ended(*end) for end in one["ends"]]} for one in before["runs"]]
    found, began, expected, took = _counted(runs), time.time(), {}, 0.0
    commits = list(dict.fromkeys([*before["commits"], versions().get("commit")]))
    os.environ["LAPIS_CACHE"] = str(folder / "cache")
    for name, flags in (("rich", RICH), ("plain", PLAIN)):
        started = time.monotonic()
        if code := end(fresh(folder / name, *flags)):
            raise SystemExit(f"the undisturbed run ended with {code}: {errors(folder / name)}")
        took = time.monotonic() - started
        expected[tuple(flags)] = final(folder / name)
    with tqdm(total=kills, initial=found["kills"], unit=" kills", mininterval=10) as bar:
        for name, flags, how in itertools.islice(trials(seed), len(runs), None):
            place = folder / f"{len(runs)}"
            if isinstance(how, str):
                ends = at_boundary(place, flags, how)
            else:
                ends = at_random(place, flags, how, TIMES, longest=took, stops=0.1)
            one = {"run": name, "ends": ends, "differences": []}
            if ends[-1].code:
                one["said"] = errors(place)
            else:
                one["differences"] = differences(final(place), expected[tuple(flags)])
            shutil.rmtree(place)
            runs.append(one)
            found = _counted(runs)
            bar.update(found["kills"] - bar.n)
            write_json(
                out,
                {
                    **found,
                    "seed": seed,
                    "commits": commits,
                    "flags": {"all": FLAGS, "rich": RICH, "plain": PLAIN},
                    "seconds": before["seconds"] + round(time.time() - began),
                    "versions": versions(),
                    "runs": runs,
                },
            )
            if found["kills"] >= kills:
                return found


def _counted(runs: list[dict[str, Any]]) -> dict[str, int]:
    ends = [end for run in runs for end in run["ends"]]
    return {
        "kills": ends.count(Ended(-signal.SIGKILL, True)),
        "kills_before_it_began": ends.count(Ended(-signal.SIGKILL, False)),
        "stops": ends.count(Ended(75, True)),
        "runs": len(runs),
        "different": sum(bool(run["differences"]) for run in runs),
        "failed": sum(run["ends"][-1].code != 0 for run in runs),
    }


def main() -> int:
    """Record as the flags say; exit code 1 where a run failed or ended otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = record(options.kills, options.seed, options.out.resolve(), Path(folder))
    print(", ".join(f"{value} {name.replace('_', ' ')}" for name, value in found.items()))
    return 1 if found["different"] or found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
