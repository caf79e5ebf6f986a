"""How fast each room is, and cuDNN at every convolution site:

    python -m profiling.kernel_speed --out DIR [--kernel bn_act] [--batch 32,256] [--minutes 5]

For each shape the room's fused function, its reference run eagerly (the baseline) and its
reference under torch.compile take turns, forward and backward apart, over input sets that pass
three times the L2, in a CUDA graph. GB/s, TFLOP/s and the share of the floor come from the room's
cost and the roofs measured on this device; `roofline.png` shows every room under them. A room whose
numbers fail gets no speed-up. On a CPU the reference meets torch.compile, a room's first shape
before any second one, for three minutes; the kernels run on a GPU only, and Triton's interpreter
is never timed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor

import kernels
from kernels import timing
from kernels.launch import nhwc, why_not_triton
from kernels.shapes import RESNET34, ConvSite
from kernels.spec import Cost, Inputs, KernelSpec, Shape
from profiling import agree, rows
from profiling.pictures import draw_roofline
from profiling.roofline import Roofs, floor_us, roofs_of
from train.arguments import Parser

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BASELINE = "reference"
Function = Callable[..., Any]


def _compiled(spec: KernelSpec) -> Function:
    torch._dynamo.reset()  # one shape a compilation: what a user with fixed shapes gets
    return torch.compile(spec.reference, dynamic=False)


# name -> what is timed; the reference run eagerly is the baseline of the ratios
PROVIDERS: dict[str, Callable[[KernelSpec], Function]] = {
    BASELINE: lambda spec: spec.reference,
    "fused": lambda spec: spec.fused,
    "compile": _compiled,
}


def first_output(result: Any) -> Tensor:
    """A room's y: its output, or the first of several (the others are statistics)."""
    return result[0] if isinstance(result, tuple | list) else result


def outputs_and_gradients(function: Function, inputs: Inputs, dy: Tensor) -> dict[str, Tensor]:
    """y and the gradient of each input that takes one, with `dy` pulled back through y."""
    inputs = {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }
    y = first_output(function(**inputs))
    leaves = _leaves(inputs) if y.requires_grad else {}
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)) if leaves else ()
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def _leaves(inputs: Inputs) -> dict[str, Tensor]:
    return {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}


def check_room(spec: KernelSpec, function: Function, inputs: Inputs) -> str:
    """The two-error verdict on `function`: the reference in float32 without TF32 is the truth, the
    reference in the inputs' type the yardstick."""
    exact = {
        name: value.detach().float().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    with agree.exact_convolutions():
        with torch.no_grad():
            y = first_output(spec.reference(**exact))
        dy = torch.randn(y.shape, device=y.device).to(_dtype_of(inputs))
        truth = outputs_and_gradients(spec.reference, exact, dy)
    yardstick = outputs_and_gradients(spec.reference, inputs, dy)
    return agree.verdict(outputs_and_gradients(function, inputs, dy), yardstick, truth)


def _dtype_of(inputs: Inputs) -> torch.dtype:
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def measure_room(
    spec: KernelSpec,
    shape: Shape,
    dtype: torch.dtype,
    providers: list[str],
    roofs: Roofs,
    device: torch.device,
    rounds: int,
    seconds: float = float("inf"),
) -> Iterator[rows.Row]:
    """A row for each provider and direction; a provider that fails says why in its row. A timing
    ends after about `seconds`."""
    generator = torch.Generator(device).manual_seed(0)
    costs = spec.cost(shape, dtype.itemsize)
    place = _place(spec.name, shape, dtype, device)
    sets = timing.rotations(costs["forward"].bytes, device)
    with timing.side_stream(device):
        drawn = [spec.make_inputs(shape, dtype, device, generator) for _ in range(min(sets, 4))]
        inputs = [drawn[i] if i < len(drawn) else _copy(drawn[i % 4]) for i in range(sets)]
        numerics, samplers = {}, {mode: {} for mode in costs}
        for name in dict.fromkeys((BASELINE, *providers)):
            try:
                if name == "fused" and (reason := _why_not(device)):
                    yield {**place, "provider": name, "mode": "forward", "numerics": reason}
                    continue
                function = PROVIDERS[name](spec)
                numerics[name] = check_room(spec, function, inputs[0])
                calls = _calls(function, inputs)
                for mode in calls.keys() & costs.keys():
                    samplers[mode][name] = timing.graph_sampler(calls[mode], device)
            except Exception as error:  # a failing provider is a result
                numerics[name] = _failure(error)
                yield {**place, "provider": name, "mode": "forward", "numerics": numerics[name]}
        for mode, of_mode in samplers.items():
            found = timing.measure(of_mode, rounds, seconds) if of_mode else {}
            for name, us in found.items():
                row = _row(us, costs[mode], roofs, shape[0])
                if numerics[name] == agree.OK and name != BASELINE and BASELINE in found:
                    row |= _speedup(found[BASELINE], us)
                yield {**place, "provider": name, "mode": mode, **row, "numerics": numerics[name]}


def _failure(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {first_line[:160]}"


def _copy(inputs: Inputs) -> Inputs:
    return {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def _calls(function: Function, inputs: list[Inputs]) -> dict[str, list[timing.Call]]:
    """One call for each input set, forward and (where something takes a gradient) backward."""
    calls = {"forward": [lambda one=one: function(**one) for one in inputs]}
    if not _leaves(inputs[0]):
        return calls
    outputs = [first_output(function(**one)) for one in inputs]
    backward = []
    for one, y in zip(inputs, outputs, strict=True):
        dy, leaves = torch.randn_like(y), list(_leaves(one).values())
        backward.append(
            lambda y=y, dy=dy, leaves=leaves: torch.autograd.grad(y, leaves, dy, retain_graph=True)
        )
    return calls | {"backward": backward}


def _why_not(device: torch.device) -> str | None:
    """Why our kernels cannot be timed on `device`; the interpreter is no answer."""
    reason = "needs a CUDA device" if device.type != "cuda" else why_not_triton(device)
    return f"unavailable: {reason}" if reason else None


def _row(us: timing.Timing, cost: Cost, roofs: Roofs, batch: int) -> rows.Row:
    return {
        "us_per_image": us.median_us / batch,
        "low": us.low_us / batch,
        "high": us.high_us / batch,
        "n": us.n,
        "images_per_second": batch / us.median_us * 1e6,
        "gb_per_s": cost.bytes / us.median_us * 1e-3,
        "tflop_per_s": cost.flops / us.median_us * 1e-6,
        "floor_share": floor_us(cost, roofs) / us.median_us,
        "method": us.method,
    }


def _speedup(baseline: timing.Timing, us: timing.Timing) -> rows.Row:
    ratio = timing.speedup(baseline, us)
    return dict(zip(("speedup", "speedup_low", "speedup_high"), ratio, strict=True))


def _place(model: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> rows.Row:
    return {
        **rows.environment(device),
        "model": model,
        "batch": shape[0],
        "baseline": BASELINE,
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
    }


def measure_cudnn(
    site: ConvSite,
    batch: int,
    dtype: torch.dtype,
    roofs: Roofs,
    device: torch.device,
    rounds: int,
    seconds: float = float("inf"),
) -> Iterator[rows.Row]:
    """What our convolutions compete with: the library's fprop, dgrad and wgrad, channels-last."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, site.c, site.h, site.w, site.k, site.r, site.stride, site.padding)
    p, q = site.out
    sizes = {
        "x": (batch, site.c, site.h, site.w),
        "w": (site.k, site.c, site.r, site.r),
        "y": (batch, site.k, p, q),
    }
    moved = sum(torch.Size(size).numel() for size in sizes.values()) * dtype.itemsize

    def draw(size: tuple[int, ...]) -> Tensor:
        return nhwc(torch.randn(size, generator=generator, device=device).to(dtype))

    with timing.side_stream(device), torch.no_grad():
        first = {name: draw(size) for name, size in sizes.items()}
        sets = [first, *(_copy(first) for _ in range(timing.rotations(moved, device) - 1))]
        samplers = {
            mode: timing.graph_sampler([_conv(mode, site, **one) for one in sets], device)
            for mode in ("fprop", "dgrad", "wgrad")
            if site.name != "stem" or mode != "dgrad"  # nobody asks for the gradient of the photos
        }
        found = timing.measure(samplers, rounds, seconds)
    cost = Cost(site.flops(batch), moved)
    for mode, us in found.items():
        yield {**_place(f"conv {site.name}", shape, dtype, device), "mode": mode,
               "provider": "cudnn" if device.type == "cuda" else "onednn",
               **_row(us, cost, roofs, batch), "baseline": "", "numerics": agree.OK}  # fmt: skip


def _conv(mode: str, site: ConvSite, x: Tensor, w: Tensor, y: Tensor) -> timing.Call:
    stride, padding = [site.stride] * 2, [site.padding] * 2
    if mode == "fprop":
        return lambda: torch.conv2d(x, w, None, stride, padding)
    mask = [mode == "dgrad", mode == "wgrad", False]
    return lambda: torch.ops.aten.convolution_backward(
        y, x, w, None, stride, padding, [1, 1], False, [0, 0], 1, mask
    )


def describe(row: rows.Row) -> str:
    """One line of the table."""
    name = f"{row['model']:24} {row.get('shape', ''):26} {row['provider']:10} {row['mode']:8}"
    if not row.get("us_per_image"):
        return f"{name} {row['numerics']}"
    us = float(row["us_per_image"]) * int(row["batch"])
    line = (
        f"{name} {us:9.2f} us {float(row['gb_per_s']):7.0f} GB/s "
        f"{float(row['tflop_per_s']):6.1f} TFLOP/s {100 * float(row['floor_share']):4.0f} % "
    )
    if row["numerics"] != agree.OK:
        return f"{line} no speed-up, {row['numerics']}"
    return line + (f"{float(row['speedup']):.2f}x" if row.get("speedup") else "")


def main(argv: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    parser = Parser("profiling.kernel_speed", __doc__)
    names = [spec.name for spec in kernels.KERNELS]
    everywhere = list(PROVIDERS) if cuda else [BASELINE, "compile"]
    parser.add_argument("--kernel", default=",".join([*names, "cudnn"]), help="comma separated")
    parser.add_argument(
        "--batch", default="32,256" if cuda else "32", help="images, comma separated (%(default)s)"
    )
    parser.add_argument("--dtype", default="bfloat16", help=f"of {', '.join(DTYPES)}")
    parser.add_argument(
        "--providers", default=",".join(everywhere), help="comma separated (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=21, help="most samples of each provider")
    parser.add_argument("--seconds", type=float, default=5.0, help="limit of a timing")
    parser.add_argument("--minutes", type=float, default=60.0 if cuda else 3.0,
                        help="no new shape is begun later")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="numerics only, nothing is timed")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of results.csv and roofline.png"
    )
    args = parser.parse_args(argv)
    for flag, value, known in (
        ("--kernel", args.kernel, [*names, "cudnn"]),
        ("--dtype", args.dtype, list(DTYPES)),
        ("--providers", args.providers, list(PROVIDERS)),
    ):
        for one in value.split(","):
            if one not in known:
                parser.error(f"{flag}: unknown {one!r}; choose from {', '.join(known)}")
    until = time.perf_counter() + 60 * args.minutes
    torch.backends.cudnn.benchmark = True
    functorch.donated_buffer = False  # a backward is timed many times on one forward
    wanted, batches = args.kernel.split(","), [int(batch) for batch in args.batch.split(",")]
    if args.check:
        return _check(wanted, batches, device)
    roofs = roofs_of(args.out, device)
    tasks = _tasks(wanted, batches, [DTYPES[dtype] for dtype in args.dtype.split(",")])
    for done, task in enumerate(tasks):
        if done and time.perf_counter() > until:
            print(f"out of time: {len(tasks) - done} of {len(tasks)} shapes were not measured")
            break
        print(f"{done + 1} of {len(tasks)}", flush=True)
        measured = _measure(task, args.providers.split(","), roofs, device, args)
        for row in measured:
            rows.append(args.out / "results.csv", row)
            print("  " + describe(row), flush=True)
    picture = draw_roofline(rows.read(args.out / "results.csv"), roofs)
    if picture:
        (args.out / "roofline.png").write_bytes(picture)
    rows.note_command(args.out, "profiling.kernel_speed", argv)
    return 0


Task = tuple[KernelSpec | ConvSite, int, Shape, torch.dtype]


def _tasks(names: list[str], batches: list[int], dtypes: list[torch.dtype]) -> list[Task]:
    """What is measured, in an order that may be cut short: every room's first shape, every room's
    second, and so on; the library's convolutions count as a room."""
    sites: dict[str, list[tuple[KernelSpec | ConvSite, Shape]]] = {
        spec.name: [(spec, shape) for shape in dict.fromkeys((0, *s[1:]) for s in spec.shapes)]
        for spec in kernels.KERNELS
    }
    sites["cudnn"] = [(site, ()) for site in RESNET34]
    ordered = [one for turn in zip_longest(*(sites[name] for name in names)) for one in turn if one]
    return [
        (thing, batch, (batch, *shape[1:]), dtype)
        for batch, dtype in product(batches, dtypes)
        for thing, shape in ordered
    ]


def _measure(
    task: Task, providers: list[str], roofs: Roofs, device: torch.device, args: argparse.Namespace
) -> Iterator[rows.Row]:
    thing, batch, shape, dtype = task
    if isinstance(thing, ConvSite):
        return measure_cudnn(thing, batch, dtype, roofs, device, args.rounds, args.seconds)
    return measure_room(thing, shape, dtype, providers, roofs, device, args.rounds, args.seconds)


def _check(names: list[str], batches: list[int], device: torch.device) -> int:
    """Print the verdict on each wanted room at each of its shapes; 1 when one fails."""
    failures = 0
    for spec in (spec for spec in kernels.KERNELS if spec.name in names):
        for batch, shape, dtype in product(batches, spec.shapes, (torch.bfloat16, torch.float16)):
            shape = (batch, *shape[1:])
            generator = torch.Generator(device).manual_seed(0)
            try:
                inputs = spec.make_inputs(shape, dtype, device, generator)
                numerics = check_room(spec, spec.fused, inputs)
            except Exception as error:  # the other shapes are still worth knowing
                numerics = _failure(error)
            failures += numerics != agree.OK
            print(f"{spec.name} {shape} {dtype}: {numerics}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
