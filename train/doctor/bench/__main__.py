"""How often the doctor is right: `python -m train.doctor.bench --out DIR`.

Hundreds of trainings of seconds, with a fault that is provoked or without one. Those that are
finished stand in DIR, so the same command goes on where it was stopped; remove DIR after a change
of rules. Half of the kinds are there to fix thresholds on, the other half to score them.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from train.arguments import flowing
from train.command import run_command
from train.doctor.bench.cases import Job, jobs, quick_jobs
from train.doctor.bench.score import score, table
from train.doctor.bench.watched import train_job, train_named
from train.errors import UsageError
from train.files import unwritable, write_atomically
from train.record import read_json, write_json

HALVES = ("fixing", "scoring")


@flowing
@dataclass(frozen=True)
class Options:
    """Which trainings, and where their results go."""

    out: Path
    """Folder of the results: one file a training, bench.json and bench.md."""
    jobs: int = os.cpu_count() or 1
    """Trainings at once, each on one core."""
    quick: bool = False
    """Only a small fixed part, about a minute on one core."""
    kinds: tuple[str, ...] = ()
    """Only these kinds of training."""
    half: str | None = None
    """Only this half: fixing or scoring."""
    seeds: int | None = None
    """Only the first few trainings of each kind."""
    debug: bool = False
    """Show a traceback with errors."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = tyro.cli(Options, prog="python -m train.doctor.bench", description=__doc__, args=argv)
    again = "interrupted; the same command goes on"
    return run_command(lambda: bench(options), debug=options.debug, interrupted=again)


def bench(options: Options) -> None:
    """Run what is not finished, write bench.json and bench.md, and print the latter.

    Raises UsageError and DiskError.
    """
    chosen = choose(options)
    folder = options.out / "trainings"
    left = [job for job in chosen if not (folder / f"{job.name}.json").exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    with tqdm(total=len(chosen), initial=len(chosen) - len(left), unit="training") as bar:
        for job, result in _trained(left, options.jobs):
            write_json(folder / f"{job.name}.json", result)
            bar.update()
    results = [read_json(folder / f"{job.name}.json") for job in chosen]
    halves = {half: score([r for r in results if r["half"] == half]) for half in HALVES}
    write_json(options.out / "bench.json", {"scores": halves, "trainings": results})
    text = table(results)
    write_atomically(options.out / "bench.md", text.encode())
    print(text)


def choose(options: Options) -> list[Job]:
    """The trainings that the flags name. Raises UsageError."""
    known = quick_jobs() if options.quick else jobs()
    names = {job.case.name for job in known}
    for kind in options.kinds:
        if kind not in names:
            raise UsageError(f"--kinds {kind}: choose of {', '.join(sorted(names))}")
    if options.half not in (None, *HALVES):
        raise UsageError(f"--half {options.half}: choose fixing or scoring")
    if options.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {options.jobs}")
    chosen = [
        job
        for job in known
        if (not options.kinds or job.case.name in options.kinds)
        and options.half in (None, job.half)
        and (options.seeds is None or job.number < options.seeds)
    ]
    if not chosen:
        raise UsageError("the flags leave no training: choose fewer of them")
    return chosen


def _trained(left: Sequence[Job], at_once: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Results as they come; one at a time stays in this process."""
    if at_once == 1:
        for job in left:
            yield job, train_job(job)
        return
    # a process that has computed must not be forked: threads of its libraries are missing in it
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, spawn, torch.set_num_threads, (1,)) as pool:
        places = {job.name: job for job in left}
        running = {pool.submit(train_named, name): name for name in places}
        try:
            for done in as_completed(running):
                yield places[running[done]], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    sys.exit(main())
