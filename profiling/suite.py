"""Everything a short hour on a machine should bring back, in the order of what is worth most:

    python -m profiling.suite --minutes 8 --out DIR [--only STEP]

A schedule over the other commands: measured roofs; the numerics of every room; `profiling.speed`
for training and inference at two batch sizes against the rivals; `profiling.kernel_speed` for every
room and the library's convolutions; the rivals that take long to compile; `profiling.report`. On a
CPU it is the roofs, the two speed commands and the report, ended after ten minutes. Each
step is a process of its own with a share of the time, so that one that hangs or crashes costs only
itself. After every step the results so far lie in DIR (results.csv, steps.json, suite.log).
Started again on the same DIR it goes on with what is missing.
"""

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
from profiling.rows import ROOT
from train.arguments import Parser
from train.errors import FOREIGN, DataError
from train.record import opened, write_json

STEPS = "steps.json"

REPORT_SECONDS = 60.0


@dataclass(frozen=True)
class Settings:
    """What the suite measures; no rounds: each command's own."""

    out: Path
    minutes: float
    model: str
    batches: str
    image_size: int
    rounds: int | None
    cuda: bool


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


def read_outcomes(folder: Path) -> dict[str, Outcome]:
    """How the steps of a suite ended, by name. Raises DataError for a damaged file."""
    path = folder / STEPS
    try:
        found = opened(json.loads(path.read_bytes())) if path.exists() else {}
        outcomes = {name: Outcome(**fields) for name, fields in found.items()}
        for one in outcomes.values():
            whole = isinstance(one.status, str) and isinstance(one.detail, dict)
            if not whole or not isinstance(one.seconds, int | float):
                raise TypeError("an outcome of other types")
    except FOREIGN as error:
        raise DataError(f"{path} is damaged ({error!r}): remove it, and measure again") from error
    return outcomes


def steps(settings: Settings) -> list[Step]:
    """The schedule. What is quick and decides most comes first, compiling rivals come last."""
    if not settings.cuda:
        return [*_cpu_steps(settings), _report(settings)]
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
        _roofs(settings),
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
        _report(settings),
    ]


def _cpu_steps(settings: Settings) -> list[Step]:
    """Where the kernels do not run: the network against its rivals, the rooms' references."""
    names = [*(spec.name for spec in kernels.KERNELS), "cudnn"]
    batch = settings.batches.split(",")[0]
    return [
        _roofs(settings),
        _speed(settings, 0.65, "train", batch, ""),  # most of it compiles, or is float32
        _speed(settings, 0.3, "infer", batch, ""),
        _rooms(settings, 0.2, "rooms", names, batch, "reference,compile"),
    ]


def _roofs(settings: Settings) -> Step:
    return Step("roofs", 0.1, {"roofs": ["-m", "profiling.roofline", "--out", str(settings.out)]})


def _report(settings: Settings) -> Step:
    return Step("report", 0.1, {"report": ["-m", "profiling.report", str(settings.out)]})


def _speed(settings: Settings, share: float, mode: str, batch: str, providers: str) -> Step:
    command = [
        *("-m", "profiling.speed", "--model", settings.model, "--mode", mode, "--batch", batch),
        *("--image-size", str(settings.image_size), *_rounds(settings)),
        *("--out", str(settings.out)),
        *("--seconds", "10" if settings.cuda else "40"),
        *("--minutes", f"{0.85 * share * settings.minutes:.2f}"),
        *(["--providers", providers] if providers else []),
    ]
    label = providers.split(",")[-1] or "all"
    return Step(f"{mode}_{batch}_{label}", share, {label: command})


def _rooms(
    settings: Settings, share: float, label: str, names: list[str], batch: str, providers: str
) -> Step:
    command = [
        *("-m", "profiling.kernel_speed", "--kernel", ",".join(names), "--batch", batch),
        *("--providers", providers, *_rounds(settings)),
        *("--minutes", f"{0.8 * share * settings.minutes:.2f}", "--out", str(settings.out)),
    ]
    return Step(f"{label}_{batch}", share, {label: command})


def _rounds(settings: Settings) -> list[str]:
    return [] if settings.rounds is None else ["--rounds", str(settings.rounds)]


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


def main(argv: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = Parser("profiling.suite", __doc__)
    parser.add_argument(
        "--minutes", type=float, default=8.0 if cuda else 9.0, help="for all together (%(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the results; one that holds some is gone on with",
    )
    parser.add_argument("--only", help="steps whose name begins so, also when done before")
    parser.add_argument("--model", default="resnet34", help="network (%(default)s)")
    parser.add_argument(
        "--batches", default="32,256" if cuda else "32", help="a small, a large one"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=224,
        help="height and width of the images in pixels (%(default)s)",
    )
    parser.add_argument("--rounds", type=int, help="most samples; default: each command's own")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    settings = Settings(
        out, args.minutes, args.model, args.batches, args.image_size, args.rounds, cuda
    )
    out.mkdir(parents=True, exist_ok=True)
    try:
        outcomes = read_outcomes(out)
    except DataError as error:
        parser.error(str(error))
    schedule = steps(settings)
    todo = [step for step in schedule if _wanted(step, args.only, outcomes)]
    if not todo:
        names = ", ".join(step.name for step in schedule)
        parser.error(f"--only {args.only}: no such step; they are {names}")
    total, start = 60 * settings.minutes, time.perf_counter()
    for step in todo:
        left = total - (time.perf_counter() - start)
        if step.name == "report":  # what was measured in all the time deserves its page
            left = max(left, REPORT_SECONDS)
        elif left < 0.02 * total:
            print(f"{step.name}: no time left", flush=True)
            continue
        limit = min(left, max(step.share * total, REPORT_SECONDS))
        outcomes[step.name] = ended = run_step(step, limit, out / "suite.log")
        write_json(out / STEPS, {name: asdict(outcome) for name, outcome in outcomes.items()})
        print(f"{step.name}: {ended.status}, {ended.seconds} s", flush=True)
        for name, line in ended.detail.items():
            print(f"    {name}: {line}", flush=True)
    return 0


def _wanted(step: Step, only: str | None, outcomes: dict[str, Outcome]) -> bool:
    """Steps begun with `only`; else those that have not ended well, and always the report."""
    if only:
        return step.name.startswith(only)
    ended = outcomes.get(step.name)
    return step.name == "report" or ended is None or ended.status != "ok"


if __name__ == "__main__":
    sys.exit(main())
