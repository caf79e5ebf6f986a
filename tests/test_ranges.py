"""The summary of a trace against answers found by hand, on traces made by hand: an SQLite export,
a Chrome trace and bare lists, with nesting, gaps, late kernels and two threads."""

import json
import sqlite3

import pytest

from profiling.profile_files import write_page, write_profile
from profiling.ranges import Kernel, Range, Summary, Trace, difference, summarise
from profiling.traces import read_chrome, read_sqlite
from train.errors import DataError

MAIN, AUTOGRAD, LOADER = 1, 2, 3
# two steps of 1000 ns; the second one's forward is longer, and its last kernel runs after it ended
RANGES = [
    Range("step", MAIN, 0, 1000),
    Range("forward | 8x3", MAIN, 100, 400),
    Range("layer1.0 | 8x4", MAIN, 100, 200),
    Range("layer2.0 | 8x5", MAIN, 200, 400),
    Range("backward", MAIN, 400, 900),
    Range("layer2.0 | 8x5", AUTOGRAD, 410, 600),
    Range("layer1.0 | 8x4", AUTOGRAD, 600, 700),
    Range("step", MAIN, 2000, 3000),
    Range("forward | 8x3", MAIN, 2100, 2500),
]
KERNELS = [
    Kernel("conv", MAIN, 150, 160, 200),  # step 1, forward, layer1.0
    Kernel("norm", MAIN, 250, 260, 300),  # step 1, forward, layer2.0
    Kernel("conv", MAIN, 350, 450, 500),  # the same, though it runs during the backward
    Kernel("dgrad", AUTOGRAD, 450, 500, 600),  # step 1, backward, layer2.0
    Kernel("wgrad", AUTOGRAD, 650, 650, 700),  # step 1, backward, layer1.0
    Kernel("add", AUTOGRAD, 800, 800, 810),  # step 1, backward: no range of its own thread
    Kernel("sgd", MAIN, 950, 950, 990),  # step 1
    Kernel("copy", LOADER, 1500, 1500, 1600),  # between the steps
    Kernel("conv", MAIN, 2200, 3100, 3200),  # step 2, forward, long after both
]
TRACE = Trace(RANGES, KERNELS, "GPU")
# path: count, host, device, kernels, gaps
EXPECTED = {
    ("step",): (2, 2000, 430, 8, 60 + 150 + 50 + 100 + 140),
    ("step", "forward"): (2, 700, 230, 4, 210),
    ("step", "forward", "layer1.0"): (1, 100, 40, 1, 0),
    ("step", "forward", "layer2.0"): (1, 200, 90, 2, 150),
    ("step", "backward"): (1, 500, 160, 3, 150),
    ("step", "backward", "layer2.0"): (1, 190, 100, 1, 0),
    ("step", "backward", "layer1.0"): (1, 100, 50, 1, 0),
}


def numbers(summary: Summary) -> dict:
    return {r.path: (r.count, r.host, r.device, r.kernels, r.gaps) for r in summary.rows}


def export(path, trace, domain="lapis", launches=True):
    """A file with the tables that Nsight Systems writes for `trace`, and things that are none of
    ours: a range of another domain, one that never ended, a launch in another process."""
    base = 0x1000000
    names = sorted({kernel.name for kernel in trace.kernels} | {r.text for r in trace.ranges})
    ids = {name: number for number, name in enumerate(names, start=10)}
    database = sqlite3.connect(path)
    database.executescript(
        """create table StringIds (id integer, value text);
        create table NVTX_EVENTS (start integer, end integer, eventType integer, text text,
            globalTid integer, textId integer, domainId integer);"""
    )
    database.executemany("insert into StringIds values (?, ?)", [(i, n) for n, i in ids.items()])
    events = [(0, None, 75, domain, base, None, 4)] if domain else []
    number = 4 if domain else 0
    for at, r in enumerate(trace.ranges):  # registered strings and others
        text = (r.text, None) if at % 2 else (None, ids[r.text])
        events.append((r.start, r.end, 59, text[0], base + r.thread, text[1], number))
    events.append((50, None, 59, "epoch", base + MAIN, None, number))
    events.append((0, 5000, 59, "theirs", base + MAIN, None, 9))
    events.append((0, 5000, 60, "window", base + MAIN, None, number))
    database.executemany("insert into NVTX_EVENTS values (?, ?, ?, ?, ?, ?, ?)", events)
    if launches:
        database.executescript(
            """create table CUPTI_ACTIVITY_KIND_RUNTIME (start integer, globalTid integer,
                correlationId integer);
            create table CUPTI_ACTIVITY_KIND_KERNEL (start integer, end integer, shortName integer,
                globalPid integer, correlationId integer);
            create table CUPTI_ACTIVITY_KIND_MEMCPY (start integer, end integer, globalPid integer,
                correlationId integer);"""
        )
        for number, k in enumerate(trace.kernels):
            call = (k.launched, base + k.thread, number)
            inner, other = (k.launched + 3, base + k.thread, number), (7, 2 * base + 1, number)
            database.executemany(
                "insert into CUPTI_ACTIVITY_KIND_RUNTIME values (?, ?, ?)", [inner, call, other]
            )
            if k.name == "copy":
                row = (k.start, k.end, base, number)
                database.execute("insert into CUPTI_ACTIVITY_KIND_MEMCPY values (?, ?, ?, ?)", row)
                continue
            row = (k.start, k.end, ids[k.name], base, number)
            database.execute("insert into CUPTI_ACTIVITY_KIND_KERNEL values (?, ?, ?, ?, ?)", row)
    database.commit()
    database.close()


def chrome(path, trace, kernels="kernel"):
    """A file as torch.profiler writes it for `trace`; times in microseconds."""

    def event(kind, name, thread, start, end, **args):
        times = {"ts": start / 1000, "dur": (end - start) / 1000}
        return {
            "ph": "X",
            "cat": kind,
            "name": name,
            "pid": 9,
            "tid": thread,
            **times,
            "args": args,
        }

    events = [{"ph": "M", "name": "process_name", "pid": 9, "args": {"name": "python"}}]
    for r in trace.ranges:
        events.append(event("user_annotation", f"lapis:{r.text}", r.thread, r.start, r.end))
        events.append(event("gpu_user_annotation", f"lapis:{r.text}", 7, r.start, r.end))
    events.append(event("user_annotation", "Optimizer.step#SGD.step", MAIN, 0, 4000))
    for number, k in enumerate(trace.kernels):
        api = "cuda_driver" if number % 2 else "cuda_runtime"
        kind = "gpu_memcpy" if k.name == "copy" else kernels
        events.append(
            event(api, "launch", k.thread, k.launched, k.launched + 5, correlation=number)
        )
        events.append(event(kind, k.name, 7, k.start, k.end, correlation=number))
    path.write_text(json.dumps({"traceEvents": events}))


def test_answers_found_by_hand():
    found = summarise(TRACE)
    assert numbers(found) == EXPECTED
    assert [row.path for row in found.rows] == list(EXPECTED), "not in the order of the step"
    assert (found.steps, found.outside, found.device) == (2, 1, "GPU")
    by_path = {row.path: row for row in found.rows}
    assert by_path["step", "forward"].shape == "8x3"
    assert by_path["step", "forward"].share == pytest.approx(230 / 430)
    assert by_path["step",].top[:2] == [("conv", 3, 190), ("dgrad", 1, 100)]


def test_both_files_say_what_the_lists_say(tmp_path):
    export(tmp_path / "a.sqlite", TRACE)
    chrome(tmp_path / "a.json", TRACE)
    for trace in (read_sqlite(tmp_path / "a.sqlite"), read_chrome(tmp_path / "a.json")):
        found = summarise(trace)
        assert numbers(found) == EXPECTED
        assert (found.steps, found.outside, found.device) == (2, 1, "GPU")


def test_a_profile_of_a_gpu_in_its_files(tmp_path):
    """Kernels that run after their step ended are in the picture, and nothing is said of layers
    where a CUDA graph hides them."""
    write_profile(tmp_path / "layers", TRACE, "Nsight Systems")
    write_page(tmp_path / "layers", "command", summarise(TRACE), "before")
    page = (tmp_path / "layers" / "profile.html").read_text()
    for text in ("GPU time", "8x3", "dgrad", "Against before", "layer2.0"):
        assert text in page
    steps = [r for r in RANGES if r.text == "step"]
    write_profile(tmp_path / "graph", Trace(steps, KERNELS, "GPU"), "Nsight Systems")
    write_page(tmp_path / "graph", "command")
    for name in ("layers", "graph"):
        assert (tmp_path / name / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_ranges_without_a_domain_and_without_kernels(tmp_path):
    """What a machine without a GPU records through torch.cuda.nvtx: shares are of host time."""
    export(tmp_path / "a.sqlite", TRACE, domain=None, launches=False)
    found = summarise(read_sqlite(tmp_path / "a.sqlite"))
    assert found.device == "none"
    shares = {row.path: row.share for row in found.rows}
    assert shares["step", "forward"] == 700 / 2000
    assert shares["step", "backward", "layer2.0"] == 190 / 2000


def test_a_step_is_the_same_row_whether_or_not_its_epoch_is_whole():
    found = summarise(Trace([*RANGES, Range("epoch", MAIN, 1900, 3500)], KERNELS, "GPU"))
    rows = numbers(found)
    epoch = rows.pop(("epoch",))
    assert rows == EXPECTED
    assert epoch == (1, 1600, 100, 1, 0)
    assert found.steps == 2


def test_kernels_that_overlap_leave_no_gap_and_are_both_counted():
    kernels = [Kernel("a", MAIN, 10, 100, 300), Kernel("b", MAIN, 20, 200, 250)]
    kernels += [Kernel("c", MAIN, 30, 290, 400), Kernel("d", MAIN, 40, 450, 460)]
    found = summarise(Trace([Range("step", MAIN, 0, 1000)], kernels, "GPU"))
    assert numbers(found) == {("step",): (1, 1000, 200 + 50 + 110 + 10, 4, 50)}


def test_a_gap_is_none_where_another_range_keeps_the_device_busy():
    ranges = [Range("step", MAIN, 0, 100), Range("a", MAIN, 0, 40), Range("b", MAIN, 40, 90)]
    kernels = [Kernel("k", MAIN, 10, 10, 20), Kernel("k", MAIN, 50, 25, 70)]
    kernels.append(Kernel("k", MAIN, 30, 80, 90))
    found = numbers(summarise(Trace(ranges, kernels, "GPU")))
    assert found["step", "a"][4] == 5 + 10  # 20 to 25 and 70 to 80


def test_on_a_cpu_an_operator_counts_once_and_where_the_work_is(tmp_path):
    def op(name, start, end):
        times = {"ts": start, "dur": end - start}
        return {"ph": "X", "cat": "cpu_op", "name": name, "tid": MAIN, **times, "args": {}}

    step = op("lapis:step", 0, 200) | {"cat": "user_annotation"}
    events = [step, op("conv2d", 10, 110), op("convolution", 12, 108), op("onednn", 15, 105)]
    events += [op("empty", 20, 22), op("relu_", 120, 150), op("view", 160, 160)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"traceEvents": events}))
    trace = read_chrome(path)
    assert trace.device == "CPU"
    assert [(k.name, k.start, k.end) for k in trace.kernels] == [
        ("onednn", 15_000, 105_000),
        ("relu_", 120_000, 150_000),
    ]
    assert numbers(summarise(trace)) == {("step",): (1, 200_000, 120_000, 2, 15_000)}


def test_the_difference_of_two_runs():
    half = [k._replace(end=(k.start + k.end) // 2) for k in KERNELS]
    new = summarise(Trace([*RANGES, Range("optimizer", MAIN, 2600, 2700)], half, "GPU"))
    found = {path: (before, after) for path, before, after in difference(summarise(TRACE), new)}
    assert found["step",] == (430 // 2, 215 // 2)
    assert found["step", "backward"] == (160 // 2, 80 // 2)
    assert found["step", "optimizer"] == (None, 0)


def test_a_summary_survives_its_file():
    found = summarise(TRACE)
    assert Summary.from_dict(json.loads(json.dumps(found.to_dict()))).rows[0].path == ("step",)
    again = Summary.from_dict(json.loads(json.dumps(found.to_dict())))
    assert numbers(again) == EXPECTED


def test_what_cannot_be_summarised_or_compared_says_so(tmp_path):
    with pytest.raises(DataError, match="no range of ours"):
        summarise(Trace([], KERNELS, "GPU"))
    stepless = summarise(Trace([Range("validation", MAIN, 0, 9)], [], "none"))
    with pytest.raises(DataError, match="profile more --steps"):
        difference(summarise(TRACE), stepless)
    with pytest.raises(DataError, match="GPU and the other on CPU"):
        difference(summarise(TRACE), summarise(TRACE._replace(device="CPU")))
    path = tmp_path / "broken"
    for content in ("", "[]", "not JSON"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"broken is no trace of torch\.profiler"):
            read_chrome(path)
    path.write_text("this is no database, though it is long enough to be looked at as one" * 20)
    with pytest.raises(DataError, match="broken is no export of Nsight Systems"):
        read_sqlite(path)
