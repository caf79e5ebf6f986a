"""What a trace says of each named range: the summary behind `profiling.nsys` and `train_profile`.

A trace is a list of ranges and a list of kernels, wherever they come from. A kernel belongs to the
range that was open on its thread when it was *launched*; when it ran does not matter. A thread on
which no range is open, such as autograd's, works for the one that makes the steps: what is open
there then counts, and comes before a thread's own ranges.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from profiling.nvtx import DETAIL
from train.errors import DataError

STEP = "step"
TOP = 5  # kernels named for each range


class Range(NamedTuple):
    """A range on a host thread, in nanoseconds."""

    text: str
    thread: int
    start: int
    end: int


class Kernel(NamedTuple):
    """A kernel, copy or, on a CPU, operator: where and when it was launched, and when it ran."""

    name: str
    thread: int
    launched: int
    start: int
    end: int


class Trace(NamedTuple):
    """What was recorded; `device` says what the kernels ran on: GPU, CPU, or none were traced."""

    ranges: list[Range]
    kernels: list[Kernel]
    device: str


@dataclass
class Row:
    """One range by its path, over all times that it was open; nanoseconds in total.

    host: from its beginning to its end on its thread. device: the time of its kernels, added up.
    gaps: device time without any kernel between its first kernel and its last. share: of the
    device time of all steps, or of their host time where no kernels were traced.
    """

    path: tuple[str, ...]
    shape: str
    count: int = 0
    host: int = 0
    device: int = 0
    kernels: int = 0
    gaps: int = 0
    share: float | None = None
    top: list[tuple[str, int, int]] = field(default_factory=list)  # name, count, nanoseconds


@dataclass
class Summary:
    """The rows in the order in which the ranges first opened, a parent before its children."""

    device: str
    steps: int
    rows: list[Row]
    outside: int  # kernels that no range launched

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        rows = [vars(row) | {"path": list(row.path)} for row in self.rows]
        return vars(self) | {"rows": rows}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Summary":
        """What `to_dict` returned. Raises KeyError or TypeError for anything else."""
        rows = [Row(**row | {"path": tuple(row["path"])}) for row in values["rows"]]
        return cls(values["device"], values["steps"], rows, values["outside"])


class Opened(NamedTuple):
    """A range with the one it is in."""

    range: Range
    parent: "Opened | None"

    @property
    def path(self) -> tuple[str, ...]:
        """Names from the outermost in; from a step on, for the epoch around it may be cut off."""
        name = self.range.text.split(DETAIL)[0]
        return (name,) if self.parent is None or name == STEP else (*self.parent.path, name)


class Nesting:
    """Which range is open on a thread at a moment."""

    def __init__(self, ranges: Iterable[Range]):
        by_thread: dict[int, list[Range]] = defaultdict(list)
        for one in ranges:
            by_thread[one.thread].append(one)
        self.main = _main_thread(by_thread)
        self._opened: dict[int, list[Opened]] = {}
        self._starts: dict[int, list[int]] = {}
        for thread in sorted(by_thread, key=lambda t: t != self.main):  # the main thread first
            self._opened[thread] = self._nest(thread, by_thread[thread])
            self._starts[thread] = [opened.range.start for opened in self._opened[thread]]

    def _nest(self, thread: int, ranges: list[Range]) -> list[Opened]:
        found: list[Opened] = []
        stack: list[Opened] = []
        for one in sorted(ranges, key=lambda r: (r.start, -r.end)):
            while stack and stack[-1].range.end <= one.start:
                stack.pop()
            above = stack[-1] if stack else None
            if above is None and thread != self.main:
                above = self._open_on(self.main, one.start)
            stack.append(Opened(one, above))
            found.append(stack[-1])
        return found

    def _open_on(self, thread: int, moment: int) -> Opened | None:
        index = bisect_right(self._starts.get(thread, ()), moment) - 1
        opened = self._opened[thread][index] if index >= 0 else None
        while opened is not None and (opened.range.thread != thread or opened.range.end < moment):
            opened = opened.parent if opened.range.thread == thread else None
        return opened

    def find(self, thread: int, moment: int) -> Opened | None:
        """The innermost range for work that `thread` starts at `moment`, or None."""
        return self._open_on(thread, moment) or self._open_on(self.main, moment)

    def all(self) -> list[Opened]:
        """Every range, by the time that it opened; of two at once the outer first."""
        every = [opened for found in self._opened.values() for opened in found]
        return sorted(every, key=lambda o: (o.range.start, -o.range.end))


def _main_thread(by_thread: dict[int, list[Range]]) -> int:
    """The thread that makes the steps; without steps the one with the longest range."""

    def weight(thread: int) -> tuple[int, int]:
        ranges = by_thread[thread]
        steps = sum(r.text.split(DETAIL)[0] == STEP for r in ranges)
        return steps, max(r.end - r.start for r in ranges)

    return max(by_thread, key=weight)


class Busy:
    """When the device had anything to do."""

    def __init__(self, kernels: Iterable[Kernel]):
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.before: list[int] = []  # busy time before each stretch
        total = 0
        for kernel in sorted(kernels, key=lambda k: k.start):
            if self.ends and kernel.start <= self.ends[-1]:
                total += max(0, kernel.end - self.ends[-1])
                self.ends[-1] = max(self.ends[-1], kernel.end)
                continue
            self.starts.append(kernel.start)
            self.ends.append(kernel.end)
            self.before.append(total)
            total += kernel.end - kernel.start

    def until(self, moment: int) -> int:
        """Busy time before `moment`."""
        index = bisect_right(self.starts, moment) - 1
        if index < 0:
            return 0
        return self.before[index] + min(moment, self.ends[index]) - self.starts[index]

    def idle(self, start: int, end: int) -> int:
        """Time between `start` and `end` without a kernel."""
        return end - start - (self.until(end) - self.until(start))


def summarise(trace: Trace) -> Summary:
    """Time, kernels and gaps of every range. Raises DataError when the trace has no ranges."""
    if not trace.ranges:
        raise DataError(
            "the trace holds no range of ours: is the window within the training? lower --skip,"
            " or install nvtx 0.2.11 where a newer package is not shown"
        )
    nesting, busy = Nesting(trace.ranges), Busy(trace.kernels)
    launched: dict[Opened, list[Kernel]] = defaultdict(list)
    outside = 0
    for kernel in trace.kernels:
        opened = nesting.find(kernel.thread, kernel.launched)
        outside += opened is None
        while opened is not None:
            launched[opened].append(kernel)
            opened = opened.parent
    rows: dict[tuple[str, ...], Row] = {}
    tops: dict[tuple[str, ...], Counter] = defaultdict(Counter)
    times: dict[tuple[str, ...], Counter] = defaultdict(Counter)
    for opened in nesting.all():
        path, kernels = opened.path, launched[opened]
        shape = opened.range.text.partition(DETAIL)[2]
        row = rows.setdefault(path, Row(path, shape))
        row.count += 1
        row.host += opened.range.end - opened.range.start
        row.kernels += len(kernels)
        row.device += sum(kernel.end - kernel.start for kernel in kernels)
        if kernels:
            first, last = min(k.start for k in kernels), max(k.end for k in kernels)
            row.gaps += busy.idle(first, last)
        for kernel in kernels:
            tops[path][kernel.name] += 1
            times[path][kernel.name] += kernel.end - kernel.start
    for path, row in rows.items():
        row.top = [(name, tops[path][name], ns) for name, ns in times[path].most_common(TOP)]
    steps = [row for path, row in rows.items() if path[-1] == STEP]
    _share(rows.values(), steps, "device" if trace.kernels else "host")
    ordered = sorted(rows.values(), key=_order(list(rows)))
    return Summary(trace.device, sum(row.count for row in steps), ordered, outside)


def _share(rows: Iterable[Row], steps: Sequence[Row], what: str) -> None:
    whole = sum(getattr(row, what) for row in steps)
    for row in rows:
        row.share = getattr(row, what) / whole if whole else None


def _order(paths: list[tuple[str, ...]]):
    """Depth first, siblings by the time that they first opened."""
    place = {path: number for number, path in enumerate(paths)}

    def key(row: Row) -> list[int]:
        return [place.get(row.path[:depth], -1) for depth in range(1, len(row.path) + 1)]

    return key


def difference(old: Summary, new: Summary) -> list[tuple[tuple[str, ...], int | None, int | None]]:
    """Nanoseconds a step of every path in either run, None where the other has no such range.

    Device time, or host time where one of the two has no kernels. Raises DataError when a run has
    no steps, or the two ran on different kinds of device.
    """
    if not (old.steps and new.steps):
        raise DataError("a run without a whole step cannot be compared: profile more --steps")
    if old.device != new.device:
        raise DataError(
            f"one run was traced on {old.device} and the other on {new.device}: profile both on"
            " one machine in one way"
        )
    what = "host" if old.device == "none" else "device"
    before = {row.path: getattr(row, what) // old.steps for row in old.rows}
    after = {row.path: getattr(row, what) // new.steps for row in new.rows}
    paths = list(after) + [path for path in before if path not in after]
    return [(path, before.get(path), after.get(path)) for path in paths]
