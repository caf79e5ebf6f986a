"""The runs of a study, and the threads that claim them and watch the processes that do them."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from train.files import unwritable
from train.guard import CHECKOUT
from train.record import read_json, read_jsonl, write_json
from train.study.claims import BEAT, Claim, claim

LOOK = 0.3  # seconds between looks at a process
PATIENCE = 30.0  # seconds a run has to end by itself when the study is interrupted
WAIT = 2.0  # seconds between looks for a run that another process gave up


@dataclass(frozen=True)
class Job:
    """One run of the grid. folder: its run folder. flags: those of train.run that begin it."""

    name: str
    folder: Path
    flags: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Trained and measured."""
        return all((self.folder / name).is_file() for name in ("summary.json", "measures.json"))

    @property
    def failure(self) -> Path:
        """The file that says why the last try failed."""
        return self.folder / "failure.json"

    def failed_because(self) -> tuple[str, int]:
        """The reason and the exit code of the last try."""
        if not self.failure.is_file():  # removed by a process that began later
            return "another process tries it again", 1
        why = read_json(self.failure)
        return why["reason"], why["exit_code"]

    def epochs_done(self) -> int:
        return len({line.get("epoch") for line in read_jsonl(self.folder / "metrics.jsonl")})

    def to_do(self) -> tuple[str, ...]:
        """The flags that begin the run, or go on with it. A folder in which no epoch was finished
        is emptied."""
        files = ("checkpoints/last.pt", "checkpoints/previous.pt", "summary.json")
        if any((self.folder / name).exists() for name in files):
            return "--resume", str(self.folder)
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        return self.flags


class Workers:
    """Threads that claim runs and watch the processes that do them."""

    def __init__(self, jobs: Sequence[Job], claims: Path, threads: int):
        self.jobs = jobs
        self.claims = claims
        self.threads = threads
        self.stopped = threading.Event()
        self.errors: list[BaseException] = []
        # a failure of an earlier time is tried again, one of today, also another process's, is not
        self.old_failures = {job.name: _content(job.failure) for job in jobs}

    def work(self, count: int, epochs: int) -> None:
        """Return when every run is finished or has failed. Raises what a thread raised."""
        workers = [threading.Thread(target=self._worker, daemon=True) for _ in range(count)]
        total = epochs * len(self.jobs)
        with _bar(total, sum(job.epochs_done() for job in self.jobs)) as bar:
            reported = {job.name for job in self.jobs if self._settled(job)}
            if reported:
                bar.write(f"{len(reported)} of {len(self.jobs)} runs are finished already")
            try:
                for worker in workers:
                    worker.start()
                while any(worker.is_alive() for worker in workers):
                    self._report(bar, reported)
                    time.sleep(LOOK)  # a join that Ctrl-C ends takes the thread for finished
            finally:
                self.stopped.set()
                for worker in workers:
                    worker.join()
            self._report(bar, reported)
        if self.errors:
            raise self.errors[0]

    def _report(self, bar: tqdm, reported: set[str]) -> None:
        bar.update(sum(job.epochs_done() for job in self.jobs) - bar.n)
        for job in self.jobs:
            if job.name not in reported and self._settled(job):
                reported.add(job.name)
                bar.write(f"{len(reported):>3}/{len(self.jobs)}  {job.name}: {_outcome(job)}")

    def _settled(self, job: Job) -> bool:
        failure = _content(job.failure)
        return job.finished or (failure is not None and failure != self.old_failures[job.name])

    def _worker(self) -> None:
        try:
            while not self.stopped.is_set():
                pending = [job for job in self.jobs if not self._settled(job)]
                if not pending:
                    return
                for job in pending:
                    held = claim(self.claims, job.name)
                    if held is not None:
                        break
                else:
                    self.stopped.wait(WAIT)
                    continue
                try:
                    if not self._settled(job):  # it may have been since we looked
                        self._do(job, held)
                finally:
                    held.release()
        except BaseException as error:
            self.errors.append(error)
            self.stopped.set()

    def _do(self, job: Job, held: Claim) -> None:
        flags = job.to_do()
        job.failure.unlink(missing_ok=True)
        words = [sys.executable, "-m", "train.study.child", str(os.getpid()), str(job.folder)]
        words += [*flags, "--threads", str(self.threads)]
        with open(job.folder / "log.txt", "ab") as log:
            said_before = log.tell()
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": _path()},
                start_new_session=True,  # Ctrl-C is ours to answer
            )
        beaten = time.monotonic()
        try:
            while process.poll() is None and not self.stopped.is_set():
                time.sleep(LOOK)
                if time.monotonic() - beaten > BEAT:
                    beaten = time.monotonic()
                    if not held.beat():
                        return  # somebody took this machine for dead and goes on himself
        finally:
            unfinished = process.poll() is None
            if unfinished and self.stopped.is_set():
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)
            process.kill()
            process.wait()
        if process.returncode and not unfinished:
            said = (job.folder / "log.txt").read_bytes()[said_before:]
            reason = _last_words(said.decode(errors="replace"), process.returncode)
            code = max(process.returncode, 1)
            write_json(job.failure, {"exit_code": code, "reason": reason, "when": time.time()})


def _bar(total: int, done: int) -> tqdm:
    return tqdm(
        total=total,
        initial=done,
        desc="study",
        unit="epoch",
        smoothing=0,  # runs of the same length: their mean says best what is left
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} epochs, {elapsed} gone, "
        "{remaining} left",
    )


def _outcome(job: Job) -> str:
    if not job.finished:
        return f"failed, {job.failed_because()[0]}"
    summary = read_json(job.folder / "summary.json")
    if summary["best_val_accuracy"] is None:
        return f"training accuracy {summary['final_train_accuracy']:.1%}"
    return (
        f"best validation accuracy {summary['best_val_accuracy']:.1%} (epoch "
        f"{summary['best_epoch']}), {summary['images_per_second']:.1f} images/s"
    )


def _last_words(said: str, code: int) -> str:
    """The error of train.run, or how the process died."""
    if code < 0:
        return f"ended by signal {-code}" + (", perhaps out of memory" if code == -9 else "")
    _, there, error = said.rpartition("error: ")  # behind a torn bar
    return error.splitlines()[0] if there and error.strip() else f"exit code {code}"


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _path() -> str:
    return os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
