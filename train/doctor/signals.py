"""What a run records about itself: `signals.jsonl`, one JSON object a line, told apart by `kind`.

start   once: the configuration, the photos of each class, the layers, the images as they are fed
steps   blocks of numbers, one a step: loss, accuracy (0..1), learning_rate, skipped (0 or 1)
probe   the network on a few training images, see `probe.Probe.measure`
epoch   the epoch's line of metrics.jsonl, and what its validation showed, see `watch`
stop    the loss was not finite and the training ended
one_batch, range_test, degradation   what trainings on request found, see `request`
effect  what the primary finding's remedy brought when it was tried, see `effect`
cost    at the end: the doctor's seconds and those of the training's steps
failed  the doctor itself could not go on

A step's number is the count of updates behind it: 0 is before the first. A number that is not
finite is null in the file and NaN in the arrays.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import CheckpointError
from train.files import unwritable, write_atomically
from train.record import json_line, plain, read_jsonl

FILE = "signals.jsonl"
SCHEMA = 1
PER_STEP = ("loss", "accuracy", "learning_rate", "skipped")


class Signals:
    """The records of one run, in the form that rules read."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()):
        self.start: dict[str, Any] = {}
        self.probes: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []
        self.others: dict[str, dict[str, Any]] = {}  # the latest of every other kind
        self._steps: dict[str, list[float | None]] = {name: [] for name in PER_STEP}
        self._arrays: dict[str, np.ndarray] = {}  # of _steps, made when they are asked for
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record, as it reads back from the file."""
        record = plain(record)
        kind = record["kind"]
        if kind == "start":
            self.start = self.start or record
        elif kind == "steps":
            for name in PER_STEP:
                self._steps[name] += record[name]
        elif kind == "probe":
            self.probes.append(record)
        elif kind == "epoch":
            self.epochs.append(record)
        else:
            self.others[kind] = record

    def per_step(self, name: str) -> np.ndarray:
        """float64 [steps]: one of PER_STEP; element i is of the step that made i + 1 updates."""
        kept = self._arrays.get(name)
        if kept is None or len(kept) < self.steps:
            kept = self._arrays[name] = np.array(self._steps[name], dtype=float)
        return kept

    @property
    def steps(self) -> int:
        """Updates recorded so far."""
        return len(self._steps["loss"])

    def config(self, group: str, name: str) -> Any:
        """A field of the run's configuration; None where it has no such field."""
        return self.start.get("config", {}).get(group, {}).get(name)

    def layers(self, probe: Mapping[str, Any], name: str) -> np.ndarray:
        """float64 [layers]: a column of a probe's table, in the order of `start["layers"]`."""
        return np.array(probe["layers"][name], dtype=float)


class SignalLog:
    """Writes the signals of a run, and keeps them.

    at: updates behind a run that is resumed; what was recorded later, before it was stopped, is
        dropped.
    """

    def __init__(self, folder: Path, at: int = 0):
        self.path = folder / FILE
        kept = [record for record in read_jsonl(self.path) if record.get("step", 0) <= at]
        write_atomically(self.path, b"".join(map(json_line, kept)))
        self.signals = Signals(kept)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record` to the file and to `signals`. Raises OSError.

        The disk may have it later than this returns: a signal lost with the power is no harm, and
        waiting for the disk would cost more than the probe.
        """
        with open(self.path, "ab") as stream:
            stream.write(json_line(record))
        self.signals.add(record)


def append(folder: Path, signals: Signals, record: Mapping[str, Any]) -> None:
    """Add a record to the signals of a run folder and to their file. Raises DiskError."""
    path = folder / FILE
    try:
        with open(path, "ab") as stream:
            stream.write(json_line(record))
    except OSError as error:
        raise unwritable(path, error) from error
    signals.add(record)


def load(folder: Path) -> Signals:
    """The signals of a run folder. Raises CheckpointError when a line is damaged or foreign."""
    try:
        return Signals(read_jsonl(folder / FILE))
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / FILE} is of another version, or damaged ({error!r}): remove it, and the "
            "run goes on without what was recorded"
        ) from error
