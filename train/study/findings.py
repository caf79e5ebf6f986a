"""Everything a study found, computed once for its report and for `statistics.json`."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from train.metrics import wilson
from train.study.comparing import comparisons, model_statistics, standard_error
from train.study.reasons import reasons
from train.study.results import Run, read_run
from train.study.statistics import Mean


@dataclasses.dataclass(frozen=True)
class Findings:
    """models: those asked for. runs: all of the grid. settings: what study.json holds."""

    out: Path
    models: tuple[str, ...]
    runs: tuple[Run, ...]
    settings: Mapping[str, Any]

    @classmethod
    def read(
        cls, out: Path, models: Sequence[str], runs: Mapping[str, Path], settings: Mapping[str, Any]
    ) -> "Findings":
        """From the run folders, {name: folder}. Raises CheckpointError for damaged files."""
        found = tuple(read_run(name, folder) for name, folder in runs.items())
        return cls(out, tuple(models), found, settings)

    @cached_property
    def by_model(self) -> dict[str, list[Run]]:
        """The finished runs of every model that has any."""
        of = {m: [r for r in self.runs if r.model == m and r.summary] for m in self.models}
        return {model: runs for model, runs in of.items() if runs}

    @property
    def finished(self) -> list[Run]:
        return [run for runs in self.by_model.values() for run in runs]

    @cached_property
    def statistics(self) -> dict[str, dict[str, Any]]:
        return {model: model_statistics(runs) for model, runs in self.by_model.items()}

    @cached_property
    def comparisons(self) -> list[dict[str, Any]]:
        return comparisons(self.by_model)

    @cached_property
    def base(self) -> tuple[str, str] | None:
        """A plain network and the residual one of its depth, where both have finished runs."""
        pairs = [(m, m.replace("plain", "resnet")) for m in self.by_model if "plain" in m]
        return next((pair for pair in pairs if pair[1] in self.by_model), None)

    @cached_property
    def reasons(self) -> dict[str, Any] | None:
        return reasons(*(self.by_model[model] for model in self.base)) if self.base else None

    @cached_property
    def error(self) -> dict[str, float] | None:
        return standard_error(self.finished)

    @property
    def leaked(self) -> float:
        """Mean share of the validation photos with a twin in train."""
        shares = [run.summary["split"]["leaked_share"] or 0.0 for run in self.finished]
        return float(np.mean(shares)) if shares else 0.0

    @property
    def split_kind(self) -> str:
        return self.finished[0].summary["split"]["kind"].partition(",")[0]

    def chance(self, model: str) -> float | None:
        """What always naming the most frequent class scores on the validation photos, where the
        model is not shown to be better: where it lies above the lower end of Wilson's interval with
        as many trials as one validation set has pictures. None where it is, or without
        validation."""
        classes, error = self.statistics[model].get("classes"), self.error
        if classes is None or error is None:
            return None
        counts = np.array(classes["confusion"])
        chance = float(counts.sum(axis=1).max() / counts.sum())
        accuracy = self.statistics[model]["best_val_accuracy"].value
        low, _ = wilson(accuracy * error["pictures"], error["pictures"])
        return chance if low <= chance else None

    def as_json(self) -> dict[str, Any]:
        names = ("statistics", "comparisons", "reasons", "leaked", "error")
        return {name: _as_json(getattr(self, name)) for name in names}


def _as_json(value: Any) -> Any:
    if isinstance(value, Mean):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value
