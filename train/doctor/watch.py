"""The doctor beside a running training: it records signals, judges them, and disturbs nothing."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from train.data.findings import counted
from train.data.loader import Batch
from train.doctor.diagnose import Diagnosis, diagnose, line, told, write_diagnosis
from train.doctor.material import network_of
from train.doctor.measures import auc
from train.doctor.probe import Probe
from train.doctor.signals import SignalLog
from train.loop import Listener
from train.metrics import probabilities
from train.optim import learning_rate
from train.training import NonFiniteLoss, Step, Training

SHARE = 0.02  # of the training's time that the doctor may take
ALLOWANCE = 2.0  # seconds it may take in any case, or a run of seconds would see no probe
EVERY = 10  # steps between two probes at least: less shows nothing new
MOST = 200  # probes of a run: more would fill the disk and show nothing new
CONFIDENT = 20  # of the most confidently wrong validation images, how many are listed


class Doctor(Listener):
    """Records the signals of `training` in `folder` and prints findings as they appear.

    material: makes the doctor's images, at most IMAGES of training, unaugmented, and what the start
        record holds beside the network's own facts, see `material.material_of`.
    every: steps from probe to probe; None stretches them until the doctor takes no more than its
        share of the time.

    An exception in here ends the doctor, not the training.
    """

    def __init__(
        self,
        folder: Path,
        training: Training,
        material: Callable[[], tuple[Batch, Mapping[str, Any]]],
        every: int | None = None,
    ):
        self.folder = folder
        self.training = training
        self.material = material
        self.every = every
        self.spent = self.trained = 0.0  # seconds
        self.timed_steps = 0
        self.diagnoses: list[Diagnosis] = []
        self.failure: str | None = None
        self.log: SignalLog | None = None
        self._told: set[tuple[str, str]] = set()
        self._costs: list[float] = []  # seconds of each probe
        self._block: list[tuple[float, ...]] = []
        self._pending: dict[str, Any] | None = None  # a probe that waits for its update
        self._shown: dict[str, Any] = {}  # by the latest evaluation
        self._seen = training.steps  # steps whose outcome has come
        self._modes = {"trained_in_eval": False, "evaluated_in_train": False}
        self._ready = 0.0

    def epoch_started(self, epoch: int, steps: int) -> None:
        self._safely(self._epoch_started, epoch, steps)

    def step_ended(self, step: Step) -> None:
        now = time.perf_counter()
        if self._block or self.timed_steps:  # the first step loads libraries and compiles
            self.trained += now - self._ready
            self.timed_steps += 1
        self._safely(self._step_ended, step)

    def paused(self, training: Training, stopping: bool) -> None:
        # a run that goes on from here keeps the blocks of steps that end here
        self._safely(self._flush)

    def evaluated(self, logits: Tensor, labels: Tensor) -> None:
        self._safely(self._evaluated, logits, labels)

    def epoch_ended(self, training: Training, record: dict[str, Any]) -> None:
        self._safely(self._epoch_ended, record)

    def ended(self, error: NonFiniteLoss | None) -> None:
        self._safely(self._ended, error)

    def summary(self) -> dict[str, Any]:
        """What summary.json says of the doctor."""
        share = self.spent / self.trained if self.trained else None
        return {
            "primary": next((d["rule"] for d in self.diagnoses if d["primary"]), None),
            "problems": [d["rule"] for d in self.diagnoses if d["severity"] == "problem"],
            "notes": [d["rule"] for d in self.diagnoses if d["severity"] == "note"],
            "probes": len(self.log.signals.probes) if self.log else 0,
            "seconds": self.spent,
            "share_of_training": share,
            "failed": self.failure,
        }

    def _safely(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call and time it; whatever it raises ends the doctor with one line."""
        if self.failure is not None:
            return
        started = time.perf_counter()
        try:
            function(*arguments)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}".split("\n")[0]
            tqdm.write(f"doctor: failed to run: {self.failure} (the training goes on)")
            self.probe = None
            self._record_failure()
        self._ready = time.perf_counter()
        self.spent += self._ready - started

    def _record_failure(self) -> None:
        try:
            self.log = self.log or SignalLog(self.folder, self._seen)
            self.log.write({"kind": "failed", "message": self.failure})
        except Exception:  # the disk may be what failed
            return

    def _epoch_started(self, epoch: int, steps: int) -> None:
        self.epoch = epoch
        if self.log is None:
            self.log = SignalLog(self.folder, self._seen)
            batch, facts = self.material()
            self.probe = Probe(self.training, batch)
            self._measure()
            if not self.log.signals.start:  # a resumed run has one
                network = network_of(self.training, self.probe, steps)
                self.log.write({"kind": "start", "step": 0, **facts, **network})

    def _step_ended(self, step: Step) -> None:
        rate = learning_rate(self.training.config, self._seen, self.training.total_steps)
        self._block.append((step.loss, step.correct / step.images, rate, float(step.skipped)))
        self._seen += 1
        self._modes["trained_in_eval"] |= not self.training.model.training
        made = self.training.steps
        if self._pending is not None and made > self._pending["step"]:
            self._finish_probe()
            self._judge()
        elif self._pending is None and made - self.probe.step >= self.interval():
            self._measure()

    def _measure(self) -> None:
        started = time.perf_counter()
        self._pending = self.probe.measure(self.training.steps)
        self._costs.append(time.perf_counter() - started)

    def _finish_probe(self) -> None:
        """Write the waiting probe with the update of the step behind it."""
        self._flush()
        self._pending["layers"]["update"] = self.probe.update(self.training.steps)
        self._pending["epoch"] = self.epoch
        self.log.write(self._pending)
        self._pending = None

    def interval(self) -> int:
        """Steps from one probe to the next, stretched until the doctor stays in its budget."""
        if self.every is not None:
            return self.every
        total = self.training.total_steps
        spacing = max(EVERY, math.ceil(total / MOST))
        if not self.timed_steps:
            return spacing
        budget = max(ALLOWANCE, SHARE * total * self.trained / self.timed_steps)
        # the first probe also loads libraries; judging and writing are shared out among all
        usual = statistics.median(self._costs[1:] or self._costs)
        cost = usual + (self.spent - sum(self._costs)) / len(self._costs)
        if self.spent + usual > budget:
            return 2 * total  # never again
        return max(spacing, math.ceil(total * cost / budget))

    def _evaluated(self, logits: Tensor, labels: Tensor) -> None:
        self._modes["evaluated_in_train"] |= self.training.model.training
        self._shown = self._validation(logits, labels)

    def _epoch_ended(self, record: Mapping[str, Any]) -> None:
        self._flush()
        shown, self._shown = self._shown, {}
        self.log.write({"kind": "epoch", "step": self._seen, **record, **self._modes, **shown})
        self._judge()

    def _validation(self, logits: Tensor, labels: Tensor) -> dict[str, Any]:
        """What an evaluation shows beyond its loss and accuracy; `place` counts the validation
        photos in the order of split.csv."""
        probability, labels = probabilities(logits.numpy()), labels.numpy()
        classes = probability.shape[1]
        predicted = probability.argmax(1)
        confusion = np.bincount(labels * classes + predicted, minlength=classes**2)
        own = probability[np.arange(len(labels)), labels]
        wrong = np.flatnonzero(predicted != labels)
        surest = wrong[np.argsort(own[wrong], kind="stable")][:CONFIDENT]
        return {
            "val_images": len(labels),
            "auc": [auc(probability[:, k], labels == k) for k in range(classes)],
            "confusion": confusion.reshape(classes, classes),
            "confidence": np.histogram(own, bins=10, range=(0, 1))[0],
            "surest_errors": [
                {
                    "place": int(i),
                    "label": int(labels[i]),
                    "predicted": int(predicted[i]),
                    "own_probability": round(float(own[i]), 4),
                }
                for i in surest
            ],
        }

    def _ended(self, error: NonFiniteLoss | None) -> None:
        if self.log is None:  # the run was resumed behind its last epoch
            self.log = SignalLog(self.folder, self._seen)
        elif self._pending is not None:
            self._finish_probe()
        elif error is None and self.training.steps > self.probe.step + self.interval() // 2:
            self._measure()
            self._finish_probe()
        self._flush()
        if error is not None:
            self.log.write({"kind": "stop", "step": self._seen, "rows": error.indices})
        self._judge(final=True)
        probes = counted(len(self.log.signals.probes), "probe")
        share = ""
        if self.trained and self.spent > ALLOWANCE:  # less is no share of anything
            share = f", {self.spent / self.trained:.1%} of the training"
        problems = [d for d in self.diagnoses if d["severity"] == "problem"]
        tqdm.write(told(problems) if problems else "doctor: no problem found")
        tqdm.write(f"doctor: {probes}, {self.spent:.1f} s{share}")

    def _flush(self) -> None:
        if self._block:
            columns = [list(column) for column in zip(*self._block, strict=True)]
            names = ("loss", "accuracy", "learning_rate", "skipped")
            self._block = []
            self.log.write(
                {"kind": "steps", "step": self._seen, **dict(zip(names, columns, strict=True))}
            )

    def _judge(self, final: bool = False) -> None:
        """Tell what is new; what the rules said before stays in doctor.json only while they do."""
        before = [(d["rule"], d["severity"]) for d in self.diagnoses]
        found = self.diagnoses = diagnose(self.log.signals, live=not final)
        if final or before != [(d["rule"], d["severity"]) for d in found]:
            write_diagnosis(self.folder, found)
        for diagnosis in found:
            if (diagnosis["rule"], diagnosis["severity"]) not in self._told:
                self._told.add((diagnosis["rule"], diagnosis["severity"]))
                tqdm.write(line(diagnosis))
