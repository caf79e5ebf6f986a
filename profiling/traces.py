"""Traces from two sources: Nsight Systems' SQLite export, and torch.profiler's Chrome trace.

The export's tables: NVTX_EVENTS (our ranges), CUPTI_ACTIVITY_KIND_KERNEL, _MEMCPY and _MEMSET (what
the GPU ran), CUPTI_ACTIVITY_KIND_RUNTIME (the calls that launched it, by correlationId within a
process). Tables of things that did not happen do not exist.
"""

import json
import sqlite3
from collections import defaultdict
from pathlib import Path
from typing import Any

from profiling.nvtx import DOMAIN
from profiling.ranges import Kernel, Range, Trace
from train.errors import FOREIGN, DataError

PUSH_POP, DOMAIN_CREATED = 59, 75  # NVTX_EVENTS.eventType
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a Chrome trace
LAUNCHES = ("cuda_runtime", "cuda_driver")


def read_sqlite(path: Path) -> Trace:
    """What `nsys export --type sqlite` wrote. Raises DataError when it is no such file."""
    try:
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            tables = {name for (name,) in database.execute("select name from sqlite_master")}
            strings = dict(_select(database, tables, "StringIds", "id, value"))
            kernels = _kernels(database, tables, strings)
            return Trace(_ranges(database, tables, strings), kernels, "GPU" if kernels else "none")
        finally:
            database.close()
    except sqlite3.Error as error:
        raise DataError(
            f"{path} is no export of Nsight Systems ({error}): profile again"
        ) from error


def _select(database: sqlite3.Connection, tables: set[str], table: str, columns: str) -> list:
    return database.execute(f"select {columns} from {table}").fetchall() if table in tables else []


def _ranges(database: sqlite3.Connection, tables: set[str], strings: dict[int, str]) -> list[Range]:
    """Ours where there is our domain, else those of no domain, as `torch.cuda.nvtx` makes them.

    One that had not ended when the recording did is left out.
    """
    columns = "text, textId, globalTid, start, end, eventType, domainId"
    events = _select(database, tables, "NVTX_EVENTS", columns)
    texts = [strings.get(text_id, "") if text is None else text for text, text_id, *_ in events]
    pairs = list(zip(texts, events, strict=True))
    ours = {e[6] for text, e in pairs if e[5] == DOMAIN_CREATED and text == DOMAIN} or {0, None}
    return [
        Range(text, thread, start, end)
        for text, (_, _, thread, start, end, kind, domain) in pairs
        if kind == PUSH_POP and domain in ours and end is not None
    ]


def _kernels(
    database: sqlite3.Connection, tables: set[str], strings: dict[int, str]
) -> list[Kernel]:
    calls: dict[tuple[int, int], tuple[int, int]] = {}  # the outermost call of each launch
    table = "CUPTI_ACTIVITY_KIND_RUNTIME"
    for start, thread, number in _select(
        database, tables, table, "start, globalTid, correlationId"
    ):
        key = (thread >> 24, number)
        calls[key] = min(calls.get(key, (start, thread)), (start, thread))
    found = []
    for kind, name in (("KERNEL", "shortName"), ("MEMCPY", "'copy'"), ("MEMSET", "'memset'")):
        columns = f"{name}, globalPid, correlationId, start, end"
        for name, process, number, start, end in _select(
            database, tables, f"CUPTI_ACTIVITY_KIND_{kind}", columns
        ):
            launched, thread = calls.get((process >> 24, number), (start, -1))
            found.append(Kernel(strings.get(name, str(name)), thread, launched, start, end))
    return found


def read_chrome(path: Path) -> Trace:
    """What torch.profiler exported. Raises DataError when it is no such file."""
    try:
        return _chrome_trace(json.loads(path.read_bytes())["traceEvents"])
    except FOREIGN as error:
        raise DataError(f"{path} is no trace of torch.profiler: profile again") from error


def _chrome_trace(events: list[dict[str, Any]]) -> Trace:
    spans = [event for event in events if event.get("ph") == "X"]
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in spans:
        by_kind[event.get("cat", "")].append(event)
    ranges = [
        Range(event["name"].removeprefix(f"{DOMAIN}:"), event["tid"], *_interval(event))
        for event in by_kind["user_annotation"]
        if event["name"].startswith(f"{DOMAIN}:")
    ]
    kernels = _chrome_kernels(by_kind)
    if kernels:
        return Trace(ranges, kernels, "GPU")
    operators = _operators(by_kind["cpu_op"])
    return Trace(ranges, operators, "CPU" if operators else "none")


def _interval(event: dict[str, Any]) -> tuple[int, int]:
    """Beginning and end in nanoseconds; the file counts microseconds."""
    start = round(event["ts"] * 1000)
    return start, start + round(event.get("dur", 0) * 1000)


def _chrome_kernels(by_kind: dict[str, list[dict[str, Any]]]) -> list[Kernel]:
    calls: dict[int, tuple[int, int]] = {}
    for event in (event for kind in LAUNCHES for event in by_kind[kind]):
        number, call = event["args"].get("correlation"), (_interval(event)[0], event["tid"])
        calls[number] = min(calls.get(number, call), call)
    found = []
    for event in (event for kind in ON_GPU for event in by_kind[kind]):
        start, end = _interval(event)
        launched, thread = calls.get(event["args"].get("correlation"), (start, -1))
        found.append(Kernel(event["name"], thread, launched, start, end))
    return found


def _operators(events: list[dict[str, Any]]) -> list[Kernel]:
    """A CPU's kernels: of operators within operators the outermost that spends at least half of
    its time itself, so that neither wrappers nor the allocations in a convolution count."""
    by_thread: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for event in events:
        by_thread[event["tid"]].append((*_interval(event), event["name"]))
    found = []
    for thread, operators in by_thread.items():
        operators.sort(key=lambda operator: (operator[0], -operator[1]))
        above: list[int | None] = []  # the operator that each is in
        within = [0] * len(operators)  # time that an operator spends in others
        stack: list[int] = []
        for index, (start, end, _) in enumerate(operators):
            while stack and operators[stack[-1]][1] <= start:
                stack.pop()
            above.append(stack[-1] if stack else None)
            if stack:
                within[stack[-1]] += end - start
            stack.append(index)
        counted = [False] * len(operators)
        for index, (start, end, name) in enumerate(operators):
            covered = above[index] is not None and counted[above[index]]
            works = end > start and 2 * within[index] <= end - start
            counted[index] = covered or works
            if works and not covered:
                found.append(Kernel(name, thread, start, start, end))
    return found
