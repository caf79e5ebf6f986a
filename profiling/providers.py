"""Who is timed by `profiling.speed`: the ways to run a network that its users have today, and ours.

Every provider gets the same weights and batch and returns a `Runner`. Training is forward,
cross-entropy, backward and an SGD-momentum step on one resident random batch; inference casts
convolution and linear weights to bfloat16 once. The network of the eager and compiled rows is
torchvision's own where it has one of that name, else ours run eagerly.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from kernels import timing
from models.compiled import tune_allocator
from models.trunk import PLANS
from profiling import meters

CLASSES = 1000


class Unavailable(Exception):
    """A provider that cannot exist on this machine; the message says why."""


@dataclass(frozen=True)
class Job:
    """What every provider is given: images [N, 3, S, S] that bfloat16 holds exactly, labels [N],
    and the state_dict all start from, on `device`."""

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
    peak_memory_gb: float | None = None

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

    def kept_bytes(self) -> int:
        """Bytes that live from one step to the next: parameters, buffers, gradients, momentum and
        the batch."""
        state = self.optimizer.state.values() if self.optimizer else ()
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        momentum = [slot["momentum_buffer"] for slot in state]
        kept = [*parameters, *self.model.buffers(), *gradients, *momentum, self.images]
        return sum(tensor.nbytes for tensor in kept)


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
    """The network as others ship it: torchvision's where it has one, else ours run eagerly."""
    import torchvision

    if name in torchvision.models.list_models(module=torchvision.models):
        return torchvision.models.get_model(name, num_classes=CLASSES)
    return models.build_model(name, num_classes=CLASSES, backend="eager")


def timm_model(name: str) -> nn.Module:
    """timm's network of that name; its parameters are called as torchvision's are."""
    try:
        import timm
    except ImportError:
        raise Unavailable("timm is not installed: pip install timm") from None
    if not timm.is_model(name):
        raise Unavailable(f"timm has no {name}")
    return timm.create_model(name, num_classes=CLASSES)


def our_model(name: str, device: torch.device, plan: str) -> nn.Module:
    """Ours on the kernels. On a CPU on the path that `--fused` takes there in a short training,
    which is eager with an allocator that keeps its memory, or (`plan` is "compile") in a long one.
    """
    if device.type == "cuda":
        backend = models.resolve_backend("triton", device).name
    else:
        tune_allocator()
        wanted = "compile" if plan == "compile" else "eager"
        backend, plan = models.resolve_backend(wanted, device).name, "known"
    return models.set_backend(models.build_model(name, num_classes=CLASSES), backend, plan)


def _runner(
    job: Job,
    *,
    network: Callable[[str], nn.Module] = peer_model,
    amp: bool = True,
    channels_last: bool = True,
    compile_mode: str | None = None,
    captured: bool = False,
    plan: str | None = None,
) -> Runner:
    """`plan` says that the network is ours, and how its blocks are trained."""
    cuda = job.device.type == "cuda"
    if captured and not cuda:
        raise Unavailable("a CUDA graph needs a CUDA device")
    if compile_mode == "reduce-overhead" and not cuda:
        raise Unavailable("reduce-overhead is default with CUDA graphs, which need a CUDA device")
    if compile_mode == "max-autotune" and not cuda:
        raise Unavailable("max-autotune has no convolutions to choose from on a CPU")
    if plan in PLANS and job.mode != "train":
        raise Unavailable("plans differ in training only")
    if plan == "compile" and cuda:
        raise Unavailable("on a GPU the kernels take this place")
    model = network(job.model) if plan is None else our_model(job.model, job.device, plan)
    model.load_state_dict(job.state)
    layout = torch.channels_last if channels_last else torch.contiguous_format
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


def eager_float32_channels_last(job: Job) -> Runner:
    return _runner(job, amp=False)


def eager_amp(job: Job) -> Runner:
    return _runner(job, channels_last=False)


def eager_amp_channels_last(job: Job) -> Runner:
    """What a careful user of plain PyTorch runs; the yardstick of everyone's numerics."""
    return _runner(job)


def timm_amp_channels_last(job: Job) -> Runner:
    """timm's network, run with the same care."""
    return _runner(job, network=timm_model)


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


def ours_compiled(job: Job) -> Runner:
    """The CPU's path where a run is long enough to pay for compiling."""
    return _runner(job, plan="compile")


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
PROVIDERS: tuple[Provider, ...] = (
    eager_float32,
    eager_float32_channels_last,
    eager_amp,
    eager_amp_channels_last,
    timm_amp_channels_last,
    eager_amp_channels_last_graph,
    compile_default,
    ours,
    ours_compiled,
    ours_graph,
    ours_graph_p1,
    ours_graph_p3,
    ours_graph_p4,
    ours_graph_measured,
    compile_reduce_overhead,
    compile_max_autotune,
)


def prepare(provider: Provider, job: Job) -> Runner:
    """Build, warm up and capture. The first step's seconds include building and compilation; the
    peak memory is that of later steps, so cuDNN's search and the compiler do not count."""
    cuda = job.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    start = time.perf_counter()
    runner = provider(job)
    runner.step()
    if cuda:
        torch.cuda.synchronize()
    runner.first_step_s = time.perf_counter() - start
    if not cuda:
        above = meters.resident_above(runner.step)
        runner.peak_memory_gb = None if above is None else (above + runner.kept_bytes()) / 1e9
        return runner
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        runner.step()
    if runner.captured:
        runner.step = timing.capture([runner.step]).replay
        runner.step()
    torch.cuda.synchronize()
    runner.peak_memory_gb = (torch.cuda.max_memory_allocated() - before) / 1e9
    return runner
