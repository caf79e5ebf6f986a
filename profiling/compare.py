"""Whether what was measured in B is faster or slower than in A, or no different:

    python -m profiling.compare A B        (result folders, or their CSV files)

For every job that both hold: how many times faster B is, by its time and, where both have a ratio
to the same baseline, by that ratio too, so that a slow minute of the machine is no verdict. The
interval printed covers the 95 % intervals of both. Within `--least` of 1 a difference is noise
whatever the interval says: samples of one process do not know what the next process will do.
Exit code 1 when something is slower or no longer computes the right numbers, else 0.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from profiling import agree, rows
from train.arguments import Parser

LEAST = 0.02
JOB = ("device", "model", "mode", "batch", "image_size", "shape", "dtype", "provider")
Z = 1.959964
FASTER, SLOWER, NOISE, WRONG = "faster", "slower", "noise", "wrong"


@dataclass(frozen=True)
class Verdict:
    """What became of one job: how many times faster, its interval, and the word for it."""

    job: tuple[str, ...]
    ratio: float
    low: float
    high: float
    word: str

    def describe(self) -> str:
        """One line: the word, the ratio with its interval, the job."""
        job = " ".join(part for part in self.job if part)
        if self.word == WRONG:
            return f"{self.word:6}  its numbers are wrong now         {job}"
        return f"{self.word:6}  {self.ratio:.3f}x [{self.low:.3f}, {self.high:.3f}]  {job}"


def newest(measured: list[rows.Row]) -> dict[tuple[str, ...], rows.Row]:
    """The last row of every job, whatever versions and commits it was measured with."""
    return {tuple(row[name] for name in JOB): row for row in measured}


def ratio_of_times(slow: rows.Row, fast: rows.Row) -> tuple[float, float, float]:
    """How many times faster the second row's time is, with the 95 % interval: medians with the
    standard error 0.93 IQR / sqrt(n) that they have for normal samples, by Student's t."""
    ratio = float(slow["us_per_image"]) / float(fast["us_per_image"])
    reach = math.hypot(_log_reach(slow), _log_reach(fast))
    return ratio, ratio * math.exp(-reach), ratio * math.exp(reach)


def _log_reach(row: rows.Row) -> float:
    """Half the 95 % interval of the logarithm of a row's median."""
    n = int(row["n"] or 1)
    if n < 2:
        return math.inf
    error = 0.93 * (float(row["high"]) - float(row["low"])) / math.sqrt(n)
    return _student(n - 1) * error / float(row["us_per_image"])


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5)."""
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    return Z + (Z**3 + Z) / 4 / freedom + second / freedom**2


def _ratio_of_speedups(before: rows.Row, after: rows.Row) -> tuple[float, float, float] | None:
    if not (before["speedup"] and after["speedup"]) or before["baseline"] != after["baseline"]:
        return None
    reach = math.hypot(
        *(math.log(float(r["speedup_high"]) / float(r["speedup_low"])) / 2 for r in (before, after))
    )
    ratio = float(after["speedup"]) / float(before["speedup"])
    return ratio, ratio * math.exp(-reach), ratio * math.exp(reach)


def compare(before: list[rows.Row], after: list[rows.Row], least: float = LEAST) -> list[Verdict]:
    """A verdict for every job that was timed in both, in the order of `after`."""
    old, verdicts = newest(before), []
    for job, row in newest(after).items():
        was = old.get(job)
        if was is None or not was["us_per_image"] or was["numerics"] != agree.OK:
            continue
        if row["numerics"] != agree.OK or not row["us_per_image"]:
            verdicts.append(Verdict(job, 0.0, 0.0, 0.0, WRONG))
            continue
        ratio, low, high = ratio_of_times(was, row)
        if paired := _ratio_of_speedups(was, row):
            low, high = min(low, paired[1]), max(high, paired[2])
        word = FASTER if low > 1 + least else SLOWER if high < 1 - least else NOISE
        verdicts.append(Verdict(job, ratio, low, high, word))
    return verdicts


def load(path: Path) -> list[rows.Row]:
    """The rows of a result folder or file. Raises ValueError when there are none."""
    file = path / "results.csv" if path.is_dir() else path
    found = rows.read(file)
    if not found:
        raise ValueError(f"{file} holds no results: measure some with profiling.speed --out")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = Parser("profiling.compare", __doc__)
    parser.add_argument("before", type=Path, help="folder or CSV file")
    parser.add_argument("after", type=Path, help="folder or CSV file")
    parser.add_argument("--least", type=float, default=LEAST, help="smaller changes are noise")
    args = parser.parse_args(argv)
    try:
        verdicts = compare(load(args.before), load(args.after), args.least)
    except ValueError as error:
        parser.error(str(error))
    if not verdicts:
        parser.error(f"{args.before} and {args.after} have no job in common")
    words = [one.word for one in verdicts]
    counted = {word: words.count(word) for word in (FASTER, SLOWER, NOISE, WRONG)}
    for one in verdicts:
        print(one.describe())
    print(", ".join(f"{count} {word}" for word, count in counted.items()))
    return 1 if counted[SLOWER] or counted[WRONG] else 0


if __name__ == "__main__":
    sys.exit(main())
