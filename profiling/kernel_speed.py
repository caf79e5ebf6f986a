"""How fast each room is, and cuDNN at every convolution site:

    python -m profiling.kernel_speed --out DIR [--kernel bn_act] [--batch 32,256] [--minutes 5]

For each shape the room's fused function, its reference run eagerly (the baseline) and its
reference under torch.compile take turns, forward and backward apart, over input sets that pass
three times the L2, in a CUDA graph. GB/s, TFLOP/s and the share of the floor come from the room's
cost and the roofs measured on this device. A room whose numbers fail gets no speed-up.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
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
from profiling.roofline import Roofs, floor_us, roofs_of

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
) -> Iterator[rows.Row]:
    """A row for each provider and direction; a provider that fails says why in its row."""
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
                function = PROVIDERS[name](spec)
                numerics[name] = check_room(spec, function, inputs[0])
                calls = _calls(function, inputs)
                for mode in calls.keys() & costs.keys():
                    samplers[mode][name] = timing.graph_sampler(calls[mode], device)
            except Exception as error:  # a failing provider is a result
                numerics[name] = _failure(error)
                yield {**place, "provider": name, "mode": "forward", "numerics": numerics[name]}
        for mode, of_mode in samplers.items():
            found = timing.measure(of_mode, rounds) if of_mode else {}
            for name, us in found.items():
                row = _row(us, costs[mode], roofs, shape[0])
                if numerics[name] == agree.OK and name != BASELINE and BASELINE in found:
                    row |= _speedup(found[BASELINE], us)
                yield {**place, "provider": _named(name, device), "mode": mode, **row,
                       "numerics": numerics[name]}  # fmt: skip


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


def _named(provider: str, device: torch.device) -> str:
    reason = why_not_triton(device) if provider == "fused" else None
    return f"fused (reference: {reason})" if reason else provider


def _row(us: timing.Timing, cost: Cost, roofs: Roofs, batch: int) -> rows.Row:
    return {
        "us_per_image": us.median_us / batch,
        "low": us.low_us / batch,
        "high": us.high_us / batch,
        "images_per_second": batch / us.median_us * 1e6,
        "gb_per_s": cost.bytes / us.median_us * 1e-3,
        "tflop_per_s": cost.flops / us.median_us * 1e-6,
        "floor_share": floor_us(cost, roofs) / us.median_us,
        "method": f"{us.method}, n={us.n}",
    }


def _speedup(baseline: timing.Timing, us: timing.Timing) -> rows.Row:
    ratio = timing.speedup(baseline, us)
    return dict(zip(("speedup", "speedup_low", "speedup_high"), ratio, strict=True))


def _place(model: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> rows.Row:
    return {
        **rows.environment(device),
        "model": model,
        "batch": shape[0],
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
    }


def measure_cudnn(
    site: ConvSite, batch: int, dtype: torch.dtype, roofs: Roofs, device: torch.device, rounds: int
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
        found = timing.measure(samplers, rounds)
    cost = Cost(site.flops(batch), moved)
    for mode, us in found.items():
        yield {**_place(f"conv {site.name}", shape, dtype, device), "mode": mode,
               "provider": "cudnn" if device.type == "cuda" else "onednn",
               **_row(us, cost, roofs, batch), "numerics": agree.OK}  # fmt: skip


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
    parser = argparse.ArgumentParser(prog="python -m profiling.kernel_speed", description=__doc__)
    names = [spec.name for spec in kernels.KERNELS]
    parser.add_argument("--kernel", default=",".join([*names, "cudnn"]), help="comma separated")
    parser.add_argument("--batch", default="32,256")
    parser.add_argument("--dtype", default="bfloat16", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--minutes", type=float, default=60.0, help="no new shape is begun later")
    parser.add_argument("--check", action="store_true", help="numerics only, nothing is timed")
    parser.add_argument("--out", type=Path, required=True)
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    functorch.donated_buffer = False  # a backward is timed many times on one forward
    if args.check:
        return _check(args.kernel.split(","), [int(b) for b in args.batch.split(",")], device)
    roofs = roofs_of(args.out, device)
    wanted, batches = args.kernel.split(","), [int(batch) for batch in args.batch.split(",")]
    jobs = product(batches, [DTYPES[dtype] for dtype in args.dtype.split(",")], wanted)
    for measured in _all_rows(list(jobs), args.providers.split(","), roofs, device, args.rounds):
        for row in measured:
            rows.append(args.out / "results.csv", row)
            print("  " + describe(row), flush=True)
        if time.perf_counter() > until:
            print("out of time: the shapes that follow were not measured", flush=True)
            return 0
    return 0


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


def _all_rows(
    jobs: list[tuple[int, torch.dtype, str]],
    providers: list[str],
    roofs: Roofs,
    device: torch.device,
    rounds: int,
) -> Iterator[Iterator[rows.Row]]:
    specs = {spec.name: spec for spec in kernels.KERNELS}
    for batch, dtype, name in jobs:
        if name == "cudnn":
            for site in RESNET34:
                yield measure_cudnn(site, batch, dtype, roofs, device, rounds)
            continue
        shapes = dict.fromkeys((batch, *shape[1:]) for shape in specs[name].shapes)
        for shape in shapes:
            yield measure_room(specs[name], shape, dtype, providers, roofs, device, rounds)


if __name__ == "__main__":
    sys.exit(main())
