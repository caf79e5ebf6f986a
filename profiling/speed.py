"""How fast a model trains and predicts, against its rivals:

    python -m profiling.speed --model resnet34 --batch 32,256 --mode train,infer --out DIR

Each provider (`profiling/providers.py`) is checked against a float32 reference of the same weights
and batch: its error may be twice that of plain PyTorch in bfloat16. Then it is timed in turns with
the one baseline, so that a ratio never compares two minutes of different weather; on a CPU all
providers take turns. Times are medians with quartiles. A speed-up is the median of the ratios of
each turn with the 95 % interval of a bootstrap over turns; one whose numbers are wrong gets none.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kernels import timing
from profiling import agree, rows
from profiling.providers import (
    PROVIDERS,
    Job,
    Provider,
    eager_amp_channels_last,
    eager_float32,
    make_job,
)
from profiling.turns import Contestant, Facts, Failed, save_job
from train.arguments import Parser

MODES = ("train", "infer")
YARDSTICK = eager_amp_channels_last


def default_baseline(device: torch.device) -> Provider:
    """On a GPU what a careful user of PyTorch runs, on a CPU PyTorch as it comes."""
    return eager_amp_channels_last if device.type == "cuda" else eager_float32


def measure_job(
    job: Job,
    baseline: Provider,
    providers: tuple[Provider, ...],
    rounds: int,
    seconds: float,
    until: float = math.inf,
) -> Iterator[rows.Row]:
    """One row a provider (at most `rounds` samples, about `seconds` a turn of timing); one that
    fails says why in its row. On a GPU each is timed with the baseline alone, for memory's sake.

    until: when, by `time.perf_counter`, the last row should be there. Who is not ready in time is
        left out: where all take turns, in half of it.
    Raises Failed when the baseline or the reference cannot be run, or the baseline is wrong.
    """
    place = rows.environment(job.device) | {
        "model": job.model,
        "mode": job.mode,
        "batch": job.batch,
        "image_size": job.image_size,
        "dtype": "bfloat16",
        "baseline": baseline.__name__,
    }
    groups = [(one,) for one in providers] if job.device.type == "cuda" else [providers]
    with tempfile.TemporaryDirectory(prefix="lapis-speed-") as folder, ExitStack() as stack:
        file = save_job(job, Path(folder))
        with Contestant(eager_float32, file) as reference:
            truth = reference.exact_outputs()
        with Contestant(YARDSTICK, file) as eager:
            yardstick = eager.outputs()
        base = stack.enter_context(Contestant(baseline, file))
        if (numerics := agree.verdict(base.outputs(), yardstick, truth)) != agree.OK:
            raise Failed(f"a ratio to wrong numbers is none: {numerics}")
        for group in groups:
            for provider, row in _measure_group(
                job, (baseline, base), group, file, (truth, yardstick), rounds, seconds, until
            ):
                yield place | {"provider": provider.__name__} | row


def _measure_group(
    job: Job,
    baseline: tuple[Provider, Contestant],
    providers: tuple[Provider, ...],
    file: Path,
    known: tuple[dict[str, Tensor], dict[str, Tensor]],
    rounds: int,
    seconds: float,
    until: float,
) -> Iterator[tuple[Provider, rows.Row]]:
    """Rows of providers that take turns with each other and the baseline."""
    base, contestant = baseline
    truth, yardstick = known
    running, numerics = {base: contestant}, {}
    now = time.perf_counter()
    ready_by = now + (0.5 * (until - now) if len(providers) > 1 else until - now - seconds)
    with ExitStack() as stack:
        for provider in _bar(providers, "preparing"):
            try:
                if provider is not base:
                    if (limit := _left(ready_by)) == 0:
                        raise Failed("out of time: not begun")
                    running[provider] = stack.enter_context(Contestant(provider, file, limit))
                numerics[provider] = agree.verdict(running[provider].outputs(), yardstick, truth)
            except Failed as reason:
                running.pop(provider, None)
                yield provider, {"numerics": str(reason)}
        if not numerics:
            return
        try:
            with _bar(range((rounds + 1) * len(running)), "timing") as bar:
                samplers = {
                    one.__name__: timing.Sampler(_ticking(it.sample, bar), it.facts.method)
                    for one, it in running.items()
                }
                found = timing.measure(samplers, rounds, min(seconds, until - time.perf_counter()))
            joules = {provider: running[provider].joules() for provider in numerics}
        except Failed as reason:  # whose it was cannot be told from the samples of the others
            yield from ((one, {"numerics": f"{reason} in the timing"}) for one in numerics)
            return
        for provider, verdict in numerics.items():
            us = found[provider.__name__]
            row = _row(job, running[provider].facts, us, joules[provider])
            if verdict == agree.OK and provider is not base:
                ratio = timing.speedup(found[base.__name__], us)
                row |= dict(zip(("speedup", "speedup_low", "speedup_high"), ratio, strict=True))
            yield provider, row | {"numerics": verdict}


def _left(until: float) -> float | None:
    """Seconds until then, None for ever."""
    return None if until == math.inf else max(0.0, until - time.perf_counter())


def _bar(things: Iterable, what: str) -> tqdm:
    quiet = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(things, desc=what, delay=2, leave=False, mininterval=quiet, smoothing=0)


def _ticking(sample: Callable[[], float], bar: tqdm) -> Callable[[], float]:
    def ticked() -> float:
        us = sample()
        bar.update()
        return us

    return ticked


def _row(job: Job, facts: Facts, us: timing.Timing, joules: float | None) -> rows.Row:
    return {
        "dtype": facts.dtype,
        "us_per_image": us.median_us / job.batch,
        "low": us.low_us / job.batch,
        "high": us.high_us / job.batch,
        "n": us.n,
        "images_per_second": job.batch / us.median_us * 1e6,
        "peak_memory_gb": "" if facts.peak_memory_gb is None else facts.peak_memory_gb,
        "joules_per_image": "" if joules is None else joules / job.batch,
        "first_step_s": facts.first_step_s,
        "method": us.method,
    }


def describe(row: rows.Row) -> str:
    """One line of the table: a speed-up only where the numbers were right."""
    name = f"{row['provider']:30}"
    if not row.get("us_per_image"):
        return f"{name} {row['numerics']}"
    memory, joules = row["peak_memory_gb"], row["joules_per_image"]
    line = (
        f"{name} {float(row['us_per_image']):10.2f} us/image "
        f"[{float(row['low']):.2f}, {float(row['high']):.2f}]  "
        f"{float(row['images_per_second']):9.1f} images/s  "
        f"{'' if memory == '' else f'{float(memory):.2f} GB':>8}  "
        f"{'' if joules == '' else f'{float(joules):.4f} J/image  '}"
        f"first step {float(row['first_step_s']):6.1f} s  "
    )
    if row["numerics"] != agree.OK:
        return line + f"no speed-up, {row['numerics']}"
    if row.get("speedup"):
        low, high = float(row["speedup_low"]), float(row["speedup_high"])
        return line + f"{float(row['speedup']):.3f}x [{low:.3f}, {high:.3f}]"
    return line + "baseline"


def pick(names: str) -> tuple[Provider, ...]:
    """The providers called `names` (comma separated), or all; ValueError for an unknown one."""
    known = {provider.__name__: provider for provider in PROVIDERS}
    wanted = names.split(",") if names else list(known)
    for name in wanted:
        if name not in known:
            raise ValueError(f"unknown provider {name!r}; choose from {', '.join(known)}")
    return tuple(known[name] for name in wanted)


def main(argv: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    parser = Parser("profiling.speed", __doc__)
    parser.add_argument("--model", default="resnet34", help="names, comma separated")
    parser.add_argument("--batch", default="32,256" if cuda else "32", help="comma separated")
    parser.add_argument("--mode", default="train,infer", help="train, infer or both")
    parser.add_argument(
        "--image-size",
        type=int,
        default=224,
        help="height and width of the images in pixels (%(default)s)",
    )
    parser.add_argument("--providers", default="", help="comma separated; default: all")
    parser.add_argument(
        "--baseline",
        default=default_baseline(device).__name__,
        help="whom the others are compared with (%(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=21, help="most samples of each provider")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit of a timing")
    parser.add_argument("--minutes", type=float, default=60.0 if cuda else 9.0,
                        help="for all together; who is not ready in time is left out")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of results.csv")
    args = parser.parse_args(argv)
    try:
        providers, baselines = pick(args.providers), pick(args.baseline)
        jobs = list(product(args.model.split(","), map(int, args.batch.split(",")), _modes(args)))
    except ValueError as error:
        parser.error(str(error))
    if len(baselines) != 1:
        parser.error("--baseline: one provider, so that every ratio has the same denominator")
    end = time.perf_counter() + 60 * args.minutes
    for done, (model, batch, mode) in enumerate(jobs):
        now = time.perf_counter()
        until = now + (end - now) / (len(jobs) - done)
        print(f"{model}, {mode}, batch {batch}, {args.image_size} px on {device.type}", flush=True)
        try:
            job = make_job(model, mode, batch, args.image_size, device)
            if cuda:
                torch.cuda.empty_cache()  # the processes need it
            limits = (args.rounds, args.seconds, until)
            for row in measure_job(job, baselines[0], providers, *limits):
                rows.append(args.out / "results.csv", row)
                print("  " + describe(row), flush=True)
        except Failed as reason:
            print(f"error: baseline or reference of {model}: {reason}", file=sys.stderr)
            return 1
    rows.note_command(args.out, "profiling.speed", argv)
    return 0


def _modes(args: argparse.Namespace) -> list[str]:
    for mode in args.mode.split(","):
        if mode not in MODES:
            raise ValueError(f"--mode: {mode!r} is neither train nor infer")
    return args.mode.split(",")


if __name__ == "__main__":
    sys.exit(main())
