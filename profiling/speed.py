"""How fast a model trains and predicts, against its rivals:

    python -m profiling.speed --model resnet34 --batch 32,256 --mode train,infer --out DIR

Each provider is checked against a float32 reference of the same weights and batch, then timed in
turns with the one baseline (eager AMP, channels-last), so that a ratio never compares two
minutes of different weather. Training is forward, cross-entropy, backward and an SGD-momentum step
on one resident random batch; inference casts convolution and linear weights to bfloat16 once.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from kernels import timing
from models.trunk import PLANS
from profiling import agree, rows

CLASSES = 1000
SAMPLE_US = 50_000.0  # of a whole step: many steps a sample where steps are short
MODES = ("train", "infer")


class Unavailable(Exception):
    """A provider that cannot exist on this machine; the message says why."""


@dataclass(frozen=True)
class Job:
    """What every provider is given: images [N, 3, S, S] that bfloat16 holds exactly, labels [N],
    and the state_dict all start from."""

    model: str
    mode: str
    batch: int
    image_size: int
    device: torch.device
    images: Tensor
    labels: Tensor
    state: dict[str, Tensor]


@dataclass
class Runner:
    """A provider at work: `step()` is what is timed; `last` holds the loss or logits it left."""

    model: nn.Module
    step: timing.Call
    images: Tensor  # kept here: a captured step reads it at its address
    optimizer: torch.optim.Optimizer | None
    last: dict[str, Tensor]
    dtype: str
    captured: bool
    first_step_s: float = 0.0
    peak_memory_gb: float = 0.0

    def restore(self, state: dict[str, Tensor]) -> None:
        """Back to the common start, in place: a captured step keeps its addresses."""
        self.model.load_state_dict(state)
        for slot in self.optimizer.state.values() if self.optimizer else ():
            slot["momentum_buffer"].zero_()

    def outputs(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss and gradients, or logits, of one step from `state`: the very step that is timed."""
        self.restore(state)
        self.step()
        found = {name: value.detach().float().clone() for name, value in self.last.items()}
        if self.optimizer is not None:
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    found[f"gradient of {name}"] = parameter.grad.float().clone()
        return found


def make_job(model: str, mode: str, batch: int, image_size: int, device: torch.device) -> Job:
    """Random weights with running statistics that one training-mode pass has moved, and a batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, image_size, image_size, generator=generator).bfloat16()
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    torch.manual_seed(0)
    net = peer_model(model).to(device)
    images, labels = images.to(device), labels.to(device)
    with torch.no_grad():
        net.train()(images[:64].float())
    state = {name: value.detach().clone() for name, value in net.state_dict().items()}
    return Job(model, mode, batch, image_size, device, images, labels, state)


def peer_model(name: str) -> nn.Module:
    """The model as others ship it: torchvision's where it has one, else ours run eagerly."""
    import torchvision

    if name in torchvision.models.list_models(module=torchvision.models):
        return torchvision.models.get_model(name, num_classes=CLASSES)
    return models.build_model(name, num_classes=CLASSES, backend="eager")


def our_model(name: str, device: torch.device, plan: str) -> nn.Module:
    """Our model on the kernels; on a CPU on the path that `--fused` takes there."""
    backend = models.resolve_backend("triton" if device.type == "cuda" else "auto", device)
    model = models.build_model(name, num_classes=CLASSES)
    return models.set_backend(model, backend.name, plan)


def _runner(
    job: Job,
    *,
    amp: bool = True,
    channels_last: bool = True,
    compile_mode: str | None = None,
    captured: bool = False,
    plan: str | None = None,
) -> Runner:
    """`plan` says that the model is ours, and how its blocks are trained."""
    cuda = job.device.type == "cuda"
    if captured and not cuda:
        raise Unavailable("a CUDA graph needs a CUDA device")
    if compile_mode not in (None, "default") and not cuda:
        raise Unavailable(f"torch.compile's {compile_mode} differs from default only on CUDA")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if plan in PLANS and (not cuda or job.mode != "train"):
        raise Unavailable("plans differ in training on CUDA only")
    model = peer_model(job.model) if plan is None else our_model(job.model, job.device, plan)
    model.load_state_dict(job.state)
    model = model.to(job.device, memory_format=layout).train(job.mode == "train")
    images = job.images.to(torch.bfloat16 if amp else torch.float32)
    images = images.to(memory_format=layout, copy=True)
    if job.mode == "infer" and amp:
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(torch.bfloat16)
    net = model if compile_mode is None else torch.compile(model, mode=compile_mode, dynamic=False)
    last: dict[str, Tensor] = {}

    def infer() -> None:
        if compile_mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            last["logits"] = net(images)

    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=cuda, foreach=not cuda
    )

    def train() -> None:
        if compile_mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad(set_to_none=True)
        # a cached cast would be made outside the graph once and never be refreshed by a replay
        with torch.autocast(job.device.type, torch.bfloat16, enabled=amp, cache_enabled=False):
            loss = F.cross_entropy(net(images), job.labels)
        loss.backward()
        optimizer.step()
        last["loss"] = loss

    training = job.mode == "train"
    return Runner(
        model,
        train if training else infer,
        images,
        optimizer if training else None,
        last,
        "bfloat16" if amp else "float32",
        captured,
    )


def eager_float32(job: Job) -> Runner:
    """PyTorch as it comes: float32 (convolutions in TF32 on a GPU), NCHW."""
    return _runner(job, amp=False, channels_last=False)


def eager_amp(job: Job) -> Runner:
    return _runner(job, channels_last=False)


def eager_amp_channels_last(job: Job) -> Runner:
    """The baseline: what a careful user of plain PyTorch runs."""
    return _runner(job)


def eager_amp_channels_last_graph(job: Job) -> Runner:
    return _runner(job, captured=True)


def compile_default(job: Job) -> Runner:
    return _runner(job, compile_mode="default")


def compile_reduce_overhead(job: Job) -> Runner:
    return _runner(job, compile_mode="reduce-overhead")


def compile_max_autotune(job: Job) -> Runner:
    return _runner(job, compile_mode="max-autotune")


def ours(job: Job) -> Runner:
    return _runner(job, plan="known")


def ours_graph(job: Job) -> Runner:
    return _runner(job, plan="known", captured=True)


def ours_graph_measured(job: Job) -> Runner:
    """Every block on the plan that is fastest here; the first step measures what is not known."""
    return _runner(job, plan="measure", captured=True)


def ours_graph_p1(job: Job) -> Runner:
    """The library's convolutions, our passes over memory."""
    return _runner(job, plan="P1", captured=True)


def ours_graph_p3(job: Job) -> Runner:
    """Our convolutions, which do the work of the passes in their epilogues."""
    return _runner(job, plan="P3", captured=True)


def ours_graph_p4(job: Job) -> Runner:
    """The same with prologues."""
    return _runner(job, plan="P4", captured=True)


Provider = Callable[[Job], Runner]
BASELINE = eager_amp_channels_last
PROVIDERS: tuple[Provider, ...] = (
    eager_amp_channels_last,
    eager_float32,
    eager_amp,
    eager_amp_channels_last_graph,
    ours,
    ours_graph,
    ours_graph_p1,
    ours_graph_p3,
    ours_graph_p4,
    ours_graph_measured,
    compile_default,
    compile_reduce_overhead,
    compile_max_autotune,
)


def reference_outputs(job: Job) -> dict[str, Tensor]:
    """Loss and gradients, or logits, in float32 without TF32."""
    with agree.exact_convolutions():
        return _runner(job, amp=False, channels_last=False).outputs(job.state)


def prepare(provider: Provider, job: Job) -> Runner:
    """Build, warm up and capture. The first step's seconds include compilation; the peak memory is
    that of later steps (0 on a CPU), so cuDNN's search does not count."""
    cuda = job.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    start = time.perf_counter()
    runner = provider(job)
    runner.step()
    if cuda:
        torch.cuda.synchronize()
    runner.first_step_s = time.perf_counter() - start
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            runner.step()
        if runner.captured:
            runner.step = timing.capture([runner.step]).replay
            runner.step()
        torch.cuda.synchronize()
        runner.peak_memory_gb = (torch.cuda.max_memory_allocated() - before) / 1e9
    return runner


def measure_job(
    job: Job, providers: tuple[Provider, ...], rounds: int, seconds: float
) -> Iterator[rows.Row]:
    """One row a provider, as soon as it is measured (at most `rounds` samples or about `seconds`
    each); one that fails says why in its row. The baseline is timed beside every one."""
    torch._dynamo.reset()
    place = rows.environment(job.device)
    with timing.side_stream(job.device):
        truth = reference_outputs(job)
        baseline = prepare(BASELINE, job)
        yardstick = baseline.outputs(job.state)
        for provider in providers:
            row = {
                **place,
                "provider": provider.__name__,
                "model": job.model,
                "mode": job.mode,
                "batch": job.batch,
                "image_size": job.image_size,
                "dtype": "bfloat16",
            }
            try:
                runner = baseline if provider is BASELINE else prepare(provider, job)
                numerics = agree.verdict(runner.outputs(job.state), yardstick, truth)
                row |= _timed(job, baseline, runner, rounds, seconds, numerics == agree.OK)
            except Unavailable as reason:
                numerics = f"unavailable: {reason}"
            except Exception as error:  # a rival's failure is a result, and no reason to stop
                first_line = (str(error).strip().splitlines() or [""])[0]
                numerics = f"failed: {type(error).__name__}: {first_line[:160]}"
            yield row | {"numerics": numerics}


def _timed(
    job: Job, baseline: Runner, runner: Runner, rounds: int, seconds: float, correct: bool
) -> rows.Row:
    at_least = SAMPLE_US if job.device.type == "cuda" else 0.0
    samplers = {
        name: timing.loop_sampler([one.step], job.device, at_least)
        for name, one in {"baseline": baseline, "runner": runner}.items()
        if name == "runner" or one is not runner
    }
    found = timing.measure(samplers, rounds, seconds)
    us = found["runner"]
    row = {
        "dtype": runner.dtype,
        "us_per_image": us.median_us / job.batch,
        "low": us.low_us / job.batch,
        "high": us.high_us / job.batch,
        "images_per_second": job.batch / us.median_us * 1e6,
        "peak_memory_gb": runner.peak_memory_gb,
        "first_step_s": runner.first_step_s,
        "method": f"{us.method}, n={us.n}",
    }
    if correct and runner is not baseline:
        ratio = timing.speedup(found["baseline"], us)
        row |= dict(zip(("speedup", "speedup_low", "speedup_high"), ratio, strict=True))
    return row


def describe(row: rows.Row) -> str:
    """One line of the table: a speed-up only where the numbers were right."""
    name = f"{row['provider']:30}"
    if not row.get("us_per_image"):
        return f"{name} {row['numerics']}"
    line = (
        f"{name} {float(row['us_per_image']):10.2f} us/image "
        f"[{float(row['low']):.2f}, {float(row['high']):.2f}]  "
        f"{float(row['images_per_second']):9.1f} images/s  "
        f"{float(row['peak_memory_gb']):6.2f} GB  first step {float(row['first_step_s']):6.1f} s  "
    )
    if row["numerics"] != agree.OK:
        return line + f"no speed-up, {row['numerics']}"
    if row.get("speedup"):
        low, high = float(row["speedup_low"]), float(row["speedup_high"])
        line += f"{float(row['speedup']):.3f}x [{low:.3f}, {high:.3f}]"
    return line


def pick(names: str) -> tuple[Provider, ...]:
    """The providers called `names` (comma separated), or all; ValueError for an unknown one."""
    known = {provider.__name__: provider for provider in PROVIDERS}
    wanted = names.split(",") if names else list(known)
    for name in wanted:
        if name not in known:
            raise ValueError(f"--providers: unknown {name!r}; choose from {', '.join(known)}")
    return tuple(known[name] for name in wanted)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling.speed", description=__doc__)
    parser.add_argument("--model", default="resnet34", help="names, comma separated")
    parser.add_argument("--batch", default="32", help="batch sizes, comma separated")
    parser.add_argument("--mode", default="train,infer", help="train, infer or both")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--providers", default="", help="comma separated; default: all")
    parser.add_argument("--rounds", type=int, default=21, help="samples of each provider")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit of a timing")
    parser.add_argument("--out", type=Path, required=True, help="folder of results.csv")
    args = parser.parse_args(argv)
    try:
        providers = pick(args.providers)
    except ValueError as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    batches = [int(batch) for batch in args.batch.split(",")]
    for model, batch, mode in product(args.model.split(","), batches, args.mode.split(",")):
        if mode not in MODES:
            parser.error(f"--mode: {mode!r} is neither train nor infer")
        print(f"{model}, {mode}, batch {batch}, {args.image_size} px on {device.type}", flush=True)
        job = make_job(model, mode, batch, args.image_size, device)
        for row in measure_job(job, providers, args.rounds, args.seconds):
            rows.append(args.out / "results.csv", row)
            print("  " + describe(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
