"""One training of the benchmark, with the doctor beside it."""

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.config import DEFAULT, to_dict
from train.data.loader import Batch
from train.doctor.bench.cases import Job, jobs
from train.doctor.bench.pictures import CLASSES, Pictures
from train.doctor.probe import IMAGES
from train.doctor.watch import Doctor
from train.loop import Listener, fit
from train.training import NonFiniteLoss, Step, Training

EVERY = 10  # steps from probe to probe: what runs of a minute have, and more than long ones


class Photos:
    """A loader of pictures, shuffled with the epoch."""

    def __init__(self, pictures: Pictures, batch_size: int, seed: int | None = None):
        self.pictures, self.batch_size, self.seed = pictures, batch_size, seed

    def __len__(self) -> int:
        return -(-len(self.pictures[1]) // self.batch_size)

    def size_at(self, epoch: int) -> int:
        return self.pictures[0].shape[-1]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        rows = torch.arange(len(self.pictures[1]))
        if self.seed is not None:
            drawn = torch.Generator().manual_seed(1000 * self.seed + epoch)
            rows = torch.randperm(len(rows), generator=drawn)
        for chunk in rows.split(self.batch_size)[start:]:
            yield _batch(self.pictures, chunk)


class _Clock(Listener):
    """Notes the step at which the doctor first speaks of a PROBLEM; it listens behind it."""

    def __init__(self, doctor: Doctor):
        self.doctor = doctor
        self.told: int | None = None

    def step_ended(self, step: Step) -> None:
        self._look()

    def epoch_ended(self, training: Training, record: dict[str, Any]) -> None:
        self._look()

    def ended(self, error: NonFiniteLoss | None) -> None:
        self._look()

    def _look(self) -> None:
        if self.told is None and any(d["severity"] == "problem" for d in self.doctor.diagnoses):
            self.told = self.doctor.training.steps


def train_job(job: Job) -> dict[str, Any]:
    """Train, and return what the doctor found. Raises RuntimeError when the doctor failed.

    found: its findings, in its order. told: the step at which it first spoke of a PROBLEM, None if
    it never did. share: its time over that of the steps.
    """
    started = time.perf_counter()
    case = job.case
    train, val = case.data(job.seed)
    torch.manual_seed(job.seed)
    model = case.make().train()
    optim = replace(case.optim, epochs=case.epochs)
    loader = Photos(train, optim.batch_size, job.seed)
    counts = torch.bincount(train[1], minlength=CLASSES).tolist()
    training = Training(
        model,
        optim,
        total_steps=case.epochs * len(loader),
        amp_dtype=case.amp,
        mixup_alpha=case.mixup,
        cutmix_alpha=case.cutmix,
        seed=job.seed,
        class_counts=counts,
    )
    case.prepare(training)
    data = replace(DEFAULT.data, augment="none", mixup=case.mixup, cutmix=case.cutmix)
    config = replace(DEFAULT, data=data, optim=optim)
    facts = {
        "config": to_dict(config),
        "classes": [f"class{k}" for k in range(CLASSES)],
        "train_counts": counts,
        "val_counts": torch.bincount(val[1], minlength=CLASSES).tolist(),
        "twins": {"identical": case.twins, "alike": case.twins},
    }
    shown = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(job.seed))
    batch = _batch(train, shown[:IMAGES])
    with tempfile.TemporaryDirectory() as folder:
        doctor = Doctor(Path(folder), training, lambda: (batch, facts), EVERY)
        clock = _Clock(doctor)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(NonFiniteLoss):
            fit(training, loader, Photos(val, 80), CLASSES, [doctor, clock])
    if doctor.failure is not None:
        raise RuntimeError(f"{job.name}: the doctor failed: {doctor.failure}")
    found = [
        {key: diagnosis[key] for key in ("rule", "severity", "first_step", "evidence")}
        for diagnosis in doctor.diagnoses
    ]
    last = training.history[-1] if training.history else {}
    return {
        "kind": case.name,
        "half": job.half,
        "seed": job.seed,
        "causes": case.causes,
        "found": found,
        "told": clock.told,
        "steps": training.steps,
        "val_accuracy": last.get("val_accuracy"),
        "share": doctor.spent / doctor.trained if doctor.trained else None,
        "seconds": time.perf_counter() - started,
    }


def train_named(name: str) -> dict[str, Any]:
    """`train_job` for another process: the kinds hold functions, which do not travel, and what a
    package's __main__ defines cannot be found there."""
    return train_job(next(job for job in jobs() if job.name == name))


def _batch(pictures: Pictures, rows: Tensor) -> Batch:
    return Batch(pictures[0][rows], pictures[1][rows], rows)
