"""Everything a short loan of a GPU should bring back, in the order of what is worth most:

    python -m profiling.suite --minutes 8 --out DIR [--only STEP]

1 environment and measured roofs; 2 the numerics of every room on this device; 4 training and
inference of the model at two batch sizes against its rivals; 3 every room on the layer table, and
the library's convolutions; then the rivals that take long to compile; 5 one page. Each step is a
process of its own with a share of the time, so that one that hangs or crashes costs only itself.
After every measurement the results so far lie in DIR (results.csv, results.json, summary.md,
steps.json, suite.log). Started again on the same DIR it goes on with what is missing.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

import kernels
from profiling import rows, speed
from profiling.rows import ROOT


@dataclass(frozen=True)
class Settings:
    """What the suite measures; the defaults are for a GPU."""

    out: Path
    minutes: float
    model: str
    batches: str
    image_size: int
    rounds: int


@dataclass(frozen=True)
class Step:
    """A part of the suite: at most which share of the minutes it may take, and its processes (name
    -> arguments after `python`), which run side by side."""

    name: str
    share: float
    commands: dict[str, list[str]]


@dataclass
class Outcome:
    """How a step ended: ok, failed or out of time; `detail` is the last line of each process."""

    status: str
    seconds: float
    detail: dict[str, str]


def steps(settings: Settings) -> list[Step]:
    """The schedule. What is quick and decides most comes first, compiling rivals come last."""
    batches = settings.batches.split(",")
    small, large = batches[0], batches[-1]
    rivals = "eager_amp_channels_last_graph"
    quick = f"eager_amp_channels_last,{rivals},ours,ours_graph"
    names = [spec.name for spec in kernels.KERNELS]
    headline = [
        _speed(settings, 0.2, mode, batch, quick)  # the first one compiles our kernels
        for mode in ("train", "infer")
        for batch in dict.fromkeys((large, small))
    ]
    plain = [
        _speed(settings, 0.1, mode, large, "eager_float32,eager_amp") for mode in ("train", "infer")
    ]
    compiled = [
        _speed(settings, 0.2, mode, batch, "compile_default,compile_reduce_overhead")
        for mode in ("train", "infer")
        for batch in dict.fromkeys((small, large))
    ]
    planned = [
        _speed(settings, 0.3, "train", batch, "ours_graph_p1,ours_graph_p3,ours_graph_p4")
        for batch in dict.fromkeys((large, small))
    ]
    rooms = [
        _rooms(settings, 0.2, "rooms", names, small, "reference,fused"),
        _rooms(settings, 0.1, "cudnn", ["cudnn"], small, "reference"),
        _rooms(settings, 0.2, "rooms", names, large, "reference,fused"),
    ]
    return [
        Step("roofs", 0.1, {"roofs": ["-m", "profiling.roofline", "--out", str(settings.out)]}),
        Step("numerics", 0.3, {name: _numerics(name, small, settings) for name in names}),
        *headline,
        *planned,
        *compiled[:2],
        *rooms,
        *plain,
        *compiled[2:],
        _rooms(settings, 0.2, "rooms_compiled", names, small, "reference,compile"),
        _speed(settings, 0.4, "train", large, "compile_max_autotune"),
        _speed(settings, 0.4, "train", small, "compile_max_autotune"),
        _rooms(settings, 0.1, "cudnn", ["cudnn"], large, "reference"),
    ]


def _speed(settings: Settings, share: float, mode: str, batch: str, providers: str) -> Step:
    command = [
        *("-m", "profiling.speed", "--model", settings.model, "--mode", mode, "--batch", batch),
        *("--image-size", str(settings.image_size), "--rounds", str(settings.rounds)),
        *("--seconds", "10", "--providers", providers, "--out", str(settings.out)),
    ]
    label = providers.split(",")[-1]
    return Step(f"{mode}_{batch}_{label}", share, {label: command})


def _rooms(
    settings: Settings, share: float, label: str, names: list[str], batch: str, providers: str
) -> Step:
    command = [
        *("-m", "profiling.kernel_speed", "--kernel", ",".join(names), "--batch", batch),
        *("--providers", providers, "--rounds", str(settings.rounds)),
        *("--minutes", f"{0.8 * share * settings.minutes:.2f}", "--out", str(settings.out)),
    ]
    return Step(f"{label}_{batch}", share, {label: command})


def _numerics(name: str, batch: str, settings: Settings) -> list[str]:
    """The room's own tests where they can run on a GPU, else its SPEC under the two-error rule."""
    spec = next(spec for spec in kernels.KERNELS if spec.name == name)
    room = spec.launch.__module__.removeprefix("kernels.")
    tests = ROOT / "tests" / f"test_{room}.py"
    if torch.cuda.is_available() and find_spec("pytest") and tests.exists():
        options = ["-q", "-n2", "--tb=short", "-p", "no:cacheprovider"]
        return ["-m", "pytest", *options, str(tests)]
    out = ["--out", str(settings.out)]
    return ["-m", "profiling.kernel_speed", "--check", "--kernel", name, "--batch", batch, *out]


def run_step(step: Step, limit: float, log: Path) -> Outcome:
    """Run the processes of `step` side by side, at most `limit` seconds; what they print goes to
    `log`."""
    start = time.perf_counter()
    status, detail = "ok", {}
    with contextlib.ExitStack() as stack:
        running = {}
        for name, command in step.commands.items():
            output = stack.enter_context(
                tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
            )
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a limit ends compilers' workers too
            )
            stack.callback(_end, process)
            running[name] = process, output
        for name, (process, output) in running.items():
            try:
                code = process.wait(max(0.1, limit - (time.perf_counter() - start)))
                ending = "" if code == 0 else f"exit {code}: "
                status = status if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                ending = status = f"out of time ({limit:.0f} s): "
            output.seek(0)
            text = output.read()
            with log.open("a") as file:
                file.write(f"--- {step.name} {name}: {ending or 'ok'}\n{text}\n")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            detail[name] = ending + (lines[-1][:200] if lines else "")
    return Outcome(status.rstrip(": "), round(time.perf_counter() - start, 1), detail)


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write_results(out: Path, outcomes: dict[str, Outcome]) -> str:
    """steps.json, results.json and summary.md from what lies in `out`; returns the summary."""
    measured = rows.read(out / "results.csv")
    roofs_file = out / "roofs.json"
    roofs = json.loads(roofs_file.read_text()) if roofs_file.exists() else {}
    done = {name: asdict(outcome) for name, outcome in outcomes.items()}
    (out / "steps.json").write_text(json.dumps(done, indent=1))
    everything = {"roofs": roofs, "steps": done, "rows": measured}
    (out / "results.json").write_text(json.dumps(everything, indent=1))
    summary = "\n".join(
        [
            "# Measured speed\n",
            *_environment(measured, roofs),
            *_headline(measured),
            *_numerics_lines(outcomes),
            *_room_table(measured, wrong_rooms(outcomes)),
            *_library_table(measured),
            *_step_table(outcomes),
        ]
    )
    (out / "summary.md").write_text(summary)
    return summary


def wrong_rooms(outcomes: dict[str, Outcome]) -> set[str]:
    """Rooms whose numerics step did not end well: no speed-up is told of them."""
    found = outcomes.get("numerics")
    ended = found.detail.items() if found else ()
    return {name for name, line in ended if line.startswith(("exit", "out of time"))}


def _environment(measured: list[rows.Row], roofs: dict) -> list[str]:
    places = {
        ", ".join(
            f"{name} {row[name]}" for name in ("torch", "triton", "cudnn", "driver", "commit")
        )
        for row in measured
    }
    lines = [f"{roofs.get('device', 'unknown device')}; {'; '.join(sorted(places))}\n"]
    if roofs:
        lines.append(
            f"Roofs: copy {roofs['copy_gb_s']:.0f} GB/s, L2 {roofs['l2_gb_s']:.0f} GB/s, bf16 "
            f"matrix product {roofs['matmul_tflop_s']:.0f} TFLOP/s, launch "
            f"{roofs['launch_us']:.2f} us ({roofs['graph_launch_us']:.2f} us in a graph)\n"
        )
    return lines


def _headline(measured: list[rows.Row]) -> list[str]:
    lines = []
    models = [row for row in measured if row["image_size"]]
    for model, mode, batch in dict.fromkeys((r["model"], r["mode"], r["batch"]) for r in models):
        lines.append(f"## {model}, {mode}, batch {batch}\n")
        lines += _table("provider", "us/image", "quartiles", "images/s", "GB", "first step s",
                        "times the baseline", "numerics")  # fmt: skip
        these = [r for r in models if (r["model"], r["mode"], r["batch"]) == (model, mode, batch)]
        order = {provider.__name__: place for place, provider in enumerate(speed.PROVIDERS)}
        for row in sorted(these, key=lambda row: order.get(row["provider"], len(order))):
            ratio = ""
            if row["speedup"]:
                ratio = f"{row['speedup']} [{row['speedup_low']}, {row['speedup_high']}]"
            elif row["provider"] == speed.BASELINE.__name__:
                ratio = "baseline"
            spread = f"{row['low']} - {row['high']}" if row["low"] else ""
            names = ("images_per_second", "peak_memory_gb", "first_step_s")
            cells = (row["provider"], row["us_per_image"], spread, *(row[name] for name in names))
            lines.append(_line(*cells, ratio, row["numerics"]))
        lines.append("")
    return lines


def _numerics_lines(outcomes: dict[str, Outcome]) -> list[str]:
    found = outcomes.get("numerics")
    if not found:
        return []
    rooms = [_line(name, line) for name, line in found.detail.items()]
    return ["## Numerics of the rooms\n", *_table("room", "result"), *rooms, ""]


def _room_table(measured: list[rows.Row], wrong: set[str]) -> list[str]:
    lines = ["## Rooms\n"]
    lines += _table("room", "shape", "pass", "provider", "us", "GB/s", "TFLOP/s", "of the floor",
                    "times eager", "numerics")  # fmt: skip
    for row in measured:
        if row["image_size"] or row["model"].startswith("conv "):
            continue
        ratio = "" if row["model"] in wrong else row["speedup"]
        lines.append(_line(*_kernel_cells(row), ratio, row["numerics"]))
    return [*lines, ""]


def _library_table(measured: list[rows.Row]) -> list[str]:
    lines = ["## The library's convolutions\n"]
    lines += _table("site", "shape", "pass", "provider", "us", "GB/s", "TFLOP/s", "of the floor")
    lines += [_line(*_kernel_cells(row)) for row in measured if row["model"].startswith("conv ")]
    return [*lines, ""]


def _kernel_cells(row: rows.Row) -> tuple[str, ...]:
    us = f"{float(row['us_per_image']) * int(row['batch']):.1f}" if row["us_per_image"] else ""
    numbers = (row["gb_per_s"], row["tflop_per_s"], row["floor_share"])
    return (row["model"], row["shape"], row["mode"], row["provider"], us, *numbers)


def _step_table(outcomes: dict[str, Outcome]) -> list[str]:
    lines = ["## Steps\n", *_table("step", "status", "seconds")]
    return [*lines, *(_line(n, o.status, o.seconds) for n, o in outcomes.items()), ""]


def _table(*heads: str) -> list[str]:
    return [_line(*heads), _line(*("---" for _ in heads))]


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling.suite", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="steps whose name begins so, also when done before")
    parser.add_argument("--model", default="resnet34")
    parser.add_argument("--batches", default="32,256", help="a small and a large one")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args(argv)
    out = args.out.resolve()
    settings = Settings(out, args.minutes, args.model, args.batches, args.image_size, args.rounds)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "steps.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    outcomes = {name: Outcome(**outcome) for name, outcome in before.items()}
    todo = [
        step
        for step in steps(settings)
        if (step.name.startswith(args.only) if args.only else not _done(outcomes.get(step.name)))
    ]
    if args.only and not todo:
        names = ", ".join(step.name for step in steps(settings))
        parser.error(f"--only {args.only}: no such step; they are {names}")
    total, start = 60 * settings.minutes, time.perf_counter()
    for step in todo:
        left = total - (time.perf_counter() - start)
        if left < 0.02 * total:
            print(f"{step.name}: no time left", flush=True)
            continue
        outcomes[step.name] = run_step(step, min(left, step.share * total), out / "suite.log")
        write_results(out, outcomes)
        ended = outcomes[step.name]
        print(f"{step.name}: {ended.status}, {ended.seconds} s", flush=True)
        for name, line in ended.detail.items():
            print(f"    {name}: {line}", flush=True)
    write_results(out, outcomes)
    print(f"summary: {out / 'summary.md'}")
    return 0


def _done(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.status == "ok"


if __name__ == "__main__":
    sys.exit(main())
