"""What the rows of a report say in one sentence: how fast ours is, against the baseline and against
the best of its rivals."""

from collections.abc import Sequence
from dataclasses import dataclass

from profiling import agree, rows
from profiling.compare import ratio_of_times
from train.page import NoteKind

Job = tuple[str, str, str, str, str]  # device, model, mode, batch, image size
VERBS = {"train": "trains", "infer": "predicts"}
LEAST = 0.01  # a smaller lead over the best rival is called none


@dataclass(frozen=True)
class Standing:
    """Ours in one job: its best row, the best rival's, and the ratio of their times."""

    job: Job
    ours: rows.Row
    rival: rows.Row | None
    ratio: float = 1.0
    low: float = 1.0
    high: float = 1.0

    @property
    def word(self) -> str:
        """Whether ours is faster, slower or level."""
        if self.low > 1 + LEAST:
            return "faster"
        return "slower" if self.high < 1 - LEAST else "level"


def is_ours(provider: str) -> bool:
    return provider.startswith("ours")


def jobs_of(measured: Sequence[rows.Row]) -> dict[Job, list[rows.Row]]:
    """The newest row of each provider by job of a whole network; rooms are left out."""
    found: dict[Job, dict[str, rows.Row]] = {}
    for row in measured:
        if row["image_size"] and row["mode"] in VERBS:
            job = tuple(row[name] for name in ("device", "model", "mode", "batch", "image_size"))
            found.setdefault(job, {})[row["provider"]] = row
    return {job: list(by_name.values()) for job, by_name in found.items()}


def standing(job: Job, measured: Sequence[rows.Row]) -> Standing | None:
    """Where ours stands among rows whose numbers were right; None when ours is not among them."""
    right = [row for row in measured if row["us_per_image"] and row["numerics"] == agree.OK]
    right.sort(key=lambda row: float(row["us_per_image"]))
    ours = next((row for row in right if is_ours(row["provider"])), None)
    rival = next((row for row in right if not is_ours(row["provider"])), None)
    if ours is None:
        return None
    return Standing(job, ours, rival, *(ratio_of_times(rival, ours) if rival else ()))


def standings(measured: Sequence[rows.Row]) -> list[Standing | None]:
    """The standing in every job of a whole network, None where ours has no time that counts."""
    return [standing(job, found) for job, found in jobs_of(measured).items()]


def verdict(found: Sequence[Standing | None]) -> tuple[NoteKind, str]:
    """One sentence on all jobs, and how good it is: by the worst of them."""
    known = [one for one in found if one is not None]
    if not known:
        return "info", "No network of ours has been measured with the right numbers yet."
    parts = [_clause(one) for one in known]
    if missing := len(found) - len(known):
        parts.append(f"{missing} jobs more have no time of ours with the right numbers")
    slower = any(one.word == "slower" for one in known)
    devices = " and ".join(dict.fromkeys(one.job[0] for one in known))
    return "warn" if slower or missing else "good", f"On {devices} {'; '.join(parts)}."


def _clause(one: Standing) -> str:
    _, model, mode, batch, _ = one.job
    rate = float(one.ours["images_per_second"])
    text = f"{model} {VERBS[mode]} {rate:,.0f} images/s at batch {batch}"
    if one.ours["speedup"]:
        text += f", {float(one.ours['speedup']):.2f} times the speed of `{one.ours['baseline']}`"
    if one.rival is None or one.rival["provider"] == one.ours["baseline"]:
        return text
    rival = f"the best rival, `{one.rival['provider']}`"
    if one.word == "level":
        return f"{text}, level with {rival}"
    return f"{text} and {one.ratio:.2f} times that of {rival}"


def interval(middle: object, low: object, high: object) -> str:
    """A ratio with its 95 % interval that no line breaks: 1.70x [1.69, 1.71]."""
    return f"{float(middle):.2f}x\u00a0[{float(low):.2f},\u00a0{float(high):.2f}]"


def number(value: object) -> str:
    """Four significant digits with thousands, or nothing for nothing."""
    if value == "":
        return ""
    found = float(value)
    if abs(found) < 0.1:
        return f"{found:.3g}"
    digits = max(0, 4 - len(str(int(abs(found)))))
    return f"{found:,.{digits}f}"
