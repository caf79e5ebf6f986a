"""Training on several processes that `torchrun` has started: who they are, what each takes of a
batch, and what they tell one another.

    torchrun --nproc-per-node 4 -m train.run --model resnet34 --data PATH

All processes do the same steps from the same weights on their shares of the same batches. After its
backward pass a step adds up, in one all-reduce of one flat tensor, the gradients, the loss, the
count of right answers and the running statistics: all processes stay alike bit for bit. Without
torchrun, or with one process, there is no process group, and the functions return at once.

PyTorch's DistributedDataParallel is not used. Its gain is that it sends gradients while the
backward pass goes on; here a trunk of blocks is one autograd function that gives all of its
gradients at its end. It averages over processes whatever their shares, and it would have to be made
anew where --freeze-epochs thaws. `python -m profiling.scaling` says what the overlap would bring.
"""

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import Backend, chosen_plans, restore_plans, synchronise
from train.errors import LapisError, Stopped, UsageError

if TYPE_CHECKING:
    from train.data.loader import BatchOrder

T = TypeVar("T")
LEAST = 2  # images of a process that has any: batch normalisation cannot train on one


class ProcessLost(LapisError):
    """Another process of the same run has ended."""


def launched() -> bool:
    """Whether torchrun has started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def is_silent() -> bool:
    """Whether another process prints for this one."""
    return launched() and os.environ["RANK"] != "0"


def local_processes() -> int:
    """Processes of the run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1


def size() -> int:
    """Processes that are joined: 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def restarted() -> bool:
    """Whether torchrun has started the processes again after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def may_restart() -> bool:
    """Whether torchrun would start the processes again if one of them failed."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Be one of the processes that torchrun has started, on a GPU of one's own where `device` is
    one; nothing without torchrun. NCCL carries what is on GPUs, gloo the rest.

    Raises UsageError where there are fewer GPUs than processes, and ProcessLost when another
    process ends before this one.
    """
    if not launched():
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if local_processes() > gpus:  # which all of them see, and the first says
            raise UsageError(
                f"{local_processes()} processes share {gpus} GPU{'s' * (gpus > 1)}: "
                f"give torchrun --nproc-per-node {gpus}, or train with --device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    alone = True
    try:
        dist.init_process_group(backend)
        # a process that left at once, with an error all of them see, would close the connections
        # that slower ones still wait for
        sum_(torch.zeros(()))
        yield
        alone = False
    except Stopped:
        alone = False
        raise
    except RuntimeError as error:
        # gloo has no class of its own for a connection that was closed
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ProcessLost(
                "another process of this run has ended: see its error, then go on with --resume"
            ) from error
        raise
    finally:
        # behind an error NCCL would wait here for the others, who wait for this one
        if dist.is_initialized() and not (alone and device.type == "cuda"):
            dist.destroy_process_group()


def share(count: int, part: int, parts: int) -> tuple[int, int]:
    """First and last place of what process `part` of `parts` takes of `count` images: as even as
    can be, the first processes the largest. A process has LEAST images or none."""
    working = min(parts, max(1, count // LEAST))
    if part >= working:
        return count, count
    each, more = divmod(count, working)
    first = part * each + min(part, more)
    return first, first + each + (part < more)


def check_batch(batch_size: int, accumulate: int) -> None:
    """Raise UsageError where a whole batch is too small for the processes, and each one's parts."""
    least = LEAST * size() * accumulate
    if batch_size < least:
        raise UsageError(
            f"--batch-size {batch_size} is too small to divide among {size()} processes with "
            f"--accumulate {accumulate}: give at least {least}, {LEAST} images for each part"
        )


def sum_(tensor: Tensor) -> Tensor:
    """`tensor`, which becomes its sum over the processes, the same bits on all of them."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(value: int) -> int:
    """The largest `value` of any process. The host waits for it, not the GPU."""
    if size() == 1:
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def gathered(value: T) -> list[T]:
    """The `value` of every process, in their order; tensors must be on the CPU."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def from_first(job: Callable[[], T]) -> T:
    """What `job` returns on the first process, which alone does it."""
    if size() == 1:
        return job()
    found: list[Any] = [job() if is_first() else None]
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    return found[0]


def one_after_the_other(job: Callable[[], T]) -> T:
    """What `job` returns here; on every machine one process does it before the others, which find
    in the caches what it has left there."""
    if size() == 1:
        return job()
    ahead = os.environ["LOCAL_RANK"] == "0"
    found = job() if ahead else None
    largest(0)  # which nobody has before all have come here
    return found if ahead else job()


def start_alike(model: nn.Module) -> None:
    """Give all processes the weights of the first, whose processor may round otherwise."""
    if size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


@torch.no_grad()
def exchange(
    gradients: Sequence[Tensor], means: Sequence[Tensor], sums: Sequence[Tensor], weight: float
) -> list[Tensor]:
    """One all-reduce: `gradients` become their sums over the processes, `means` their means, in
    which this process has `weight`, both in place; returns the sums of `sums`.

    With a weight of 0 there was no image: what would be the mean of none is left out.
    """
    sent = [*gradients, *sums, *means]
    sizes = [tensor.numel() for tensor in sent]
    flat = torch.cat([tensor.reshape(-1) for tensor in sent])
    flat[sum(sizes[: -len(means) or None]) :] *= weight
    if weight == 0:
        flat.zero_()
    pieces = sum_(flat).split(sizes)
    found = [piece.view(tensor.shape) for piece, tensor in zip(pieces, sent, strict=True)]
    count = len(gradients) + len(sums)
    torch._foreach_copy_([*gradients, *means], [*found[: len(gradients)], *found[count:]])
    return found[len(gradients) : count]


def check_processes(state: dict[str, Any]) -> None:
    """Raise UsageError unless as many processes go on with `state` as have saved it."""
    then, now = len(state["rng"]), size()
    if then != now:
        cure = "without torchrun" if then == 1 else f"with torchrun, {then} processes in all"
        raise UsageError(
            f"the run was trained by {then} process{'es' * (then > 1)}, and {now} would go on "
            f"otherwise than it began: resume it {cure}"
        )


def synchronise_norms(model: nn.Module, backend: Backend) -> None:
    """What --sync-bn asks for. Raises UsageError for a backend that cannot."""
    if backend.name != "eager":
        raise UsageError(
            f"--sync-bn needs the eager backend, not {backend.name}, whose passes know the "
            "statistics of one process: leave out --sync-bn, or --fused and --backend"
        )
    if size() == 1:
        warnings.warn("--sync-bn has no effect: there is one process", stacklevel=2)
    else:
        synchronise(model)


def agree_on_plans(
    model: nn.Module,
    train_loader: "BatchOrder",
    val_loader: "BatchOrder | None",
    dtype: torch.dtype,
    autocast: AbstractContextManager,
) -> None:
    """Let the first process choose the plans of `model` for images of these loaders' sizes, and all
    take them; the weights, statistics and random state stay as they are."""
    if size() > 1:
        restore_plans(
            model, from_first(lambda: _plans(model, train_loader, val_loader, dtype, autocast))
        )


def _plans(
    model: nn.Module,
    train_loader: "BatchOrder",
    val_loader: "BatchOrder | None",
    dtype: torch.dtype,
    autocast: AbstractContextManager,
) -> dict[str, Any]:
    trial, device = copy.deepcopy(model), next(model.parameters()).device

    def images(shape: tuple[int, ...]) -> Tensor:
        zeros = torch.zeros(shape, dtype=dtype, device=device)
        return zeros.to(memory_format=torch.channels_last)

    with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast:
        for shape in train_loader.shapes():
            trial.train()(images(shape))
        with torch.inference_mode():
            for shape in val_loader.shapes() if val_loader is not None else ():
                trial.eval()(images(shape))
    return chosen_plans(trial)
