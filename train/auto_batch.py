"""`--auto-batch`: the largest batch that fits into the memory that is free.

Real steps of two or more sizes are measured on a copy of the network; a line through the last two
says how many images fit. On a GPU the sizes double up to what is free; on a CPU, whose memory has
no counter of its own, the tensors of two small steps are added up. An epoch keeps STEPS steps: with
fewer the network would hardly be trained. What the recipe means stays: a larger batch takes a
larger learning rate (Goyal et al. 2017; for Adam its root, Malladi et al. 2022), and where the
recipe's own batch does not fit, it goes through the network in parts.
"""

import gc
import math
import weakref
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from models import Backend
from train import distributed
from train.assembly import build, make_training
from train.config import Config
from train.data.resident import ResidentLoader, ViewLoader
from train.errors import OutOfMemoryError, UsageError
from train.inputs import Inputs, make_loaders

STEPS = 8  # an epoch keeps at least so many
SMALLEST = 4  # images of the first trial
WHOLE = 8  # batches are multiples of it: what matrix units like
# of the free memory, what a batch may take. On a CPU resident memory was up to 1.8 times
# the tensors' (four networks, batches of 8 and 32): oneDNN's workspaces, the allocator's gaps
SHARE = {"cpu": 0.5, "cuda": 0.85}
TRIAL_STEPS = 2  # the second has all that the first left behind, such as the optimizer's state


@dataclass(frozen=True)
class Memory:
    """Bytes that a step takes: `fixed`, and `image` for each image of its batch."""

    fixed: float
    image: float

    def images(self, free: float) -> int:
        """How many fit into `free` bytes."""
        return max(0, math.floor((free - self.fixed) / self.image))


def with_largest_batch(
    config: Config,
    inputs: Inputs,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    backend: Backend,
    pixels: torch.Tensor | None = None,
) -> Config:
    """`config` with the batch that fits, and a line that says why. pixels: see `make_loaders`.

    The caller's random state stays as it is. Raises UsageError where the free memory cannot be
    known, and OutOfMemoryError where not even one image fits.
    """
    if distributed.size() > 1:
        raise UsageError("--auto-batch measures one process alone: give --batch-size to several")
    if device.type == "cpu":
        backend = Backend("eager", "a trial")  # compiling would take longer than it saves
    count = len(inputs.split.train)
    if count < 2 * SMALLEST:
        raise UsageError(f"--auto-batch needs {2 * SMALLEST} training photos, not {count}")
    free = SHARE[device.type] * free_bytes(device)
    trial = partial(step_bytes, config, inputs, device, amp_dtype, backend, pixels)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        memory = measured(trial, sizes(device, count), free)
    config, reason = chosen(config, count, memory, free)
    print(f"batch: {reason}")
    return config


def chosen(config: Config, count: int, memory: Memory, free: float) -> tuple[Config, str]:
    """The batch for `count` training photos and `free` bytes, and why. Raises OutOfMemoryError."""
    optim = config.optim
    fits, most = memory.images(free), max(optim.batch_size, count // STEPS)
    why = f"{memory.image / 1e6:.1f} MB an image, {free / 1e9:.2f} GB to use"
    if fits < distributed.LEAST:
        raise OutOfMemoryError(
            f"not even {distributed.LEAST} images fit ({why}, {memory.fixed / 1e9:.2f} GB without "
            "any): lower --image-size, or choose a smaller --model"
        )
    if fits < optim.batch_size:
        parts = math.ceil(optim.batch_size / fits)
        return _with(config, batch_size=optim.batch_size, accumulate=parts), (
            f"{optim.batch_size} in {parts} parts, since {fits} fit ({why}); the learning rate "
            "stays, batch normalisation sees one part at a time"
        )
    size = min(fits, most)
    size = max(size - size % WHOLE, optim.batch_size)
    if size == optim.batch_size:
        rate, words = optim.lr, "the learning rate stays"
    elif optim.lr == "find":
        rate, words = optim.lr, "the learning rate is looked for with it"
    else:
        factor = size / optim.batch_size
        root = optim.optimizer == "adamw"
        rate = float(f"{optim.lr * (math.sqrt(factor) if root else factor):.3g}")
        words = (
            f"the learning rate grows from {optim.lr:g} to {rate:g}, with the "
            f"{'square root of the batch (AdamW)' if root else 'batch (SGD)'}"
        )
    bound = f"{fits:,} would fit, but an epoch keeps {STEPS} steps" if fits > most else "it fits"
    return _with(config, batch_size=size, lr=rate), (
        f"{size} instead of {optim.batch_size} ({bound}: {why}); {words}"
        if size != optim.batch_size
        else f"{size} ({bound}: {why}); {words}"
    )


def _with(config: Config, **changes: object) -> Config:
    """Resolved, so that whoever takes this configuration up never chooses anew."""
    return replace(
        config,
        optim=replace(config.optim, **changes),
        run=replace(config.run, auto_batch=False),
    )


def sizes(device: torch.device, count: int) -> Iterable[int]:
    """The batches to try, of at most `count` images, the smallest first."""
    if device.type == "cpu":
        return SMALLEST, 2 * SMALLEST
    return [SMALLEST * 2**n for n in range(int(math.log2(count / SMALLEST)) + 1)]


def measured(trial: Callable[[int], float], batches: Iterable[int], free: float) -> Memory:
    """The line through the two largest batches that can be tried within `free` bytes."""
    seen: list[tuple[int, float]] = []
    memory = Memory(0.0, 1.0)
    for batch in batches:
        if len(seen) > 1 and memory.fixed + memory.image * batch > free:
            break
        try:
            seen.append((batch, trial(batch)))
        except torch.OutOfMemoryError:
            break
        if len(seen) > 1:
            (small, less), (large, more) = seen[-2:]
            image = max(1.0, (more - less) / (large - small))
            memory = Memory(max(0.0, more - image * large), image)
    if len(seen) < 2:
        raise OutOfMemoryError(
            f"{2 * SMALLEST} images do not fit: lower --image-size, or choose a smaller --model"
        )
    return memory


def step_bytes(
    config: Config,
    inputs: Inputs,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    backend: Backend,
    pixels: torch.Tensor | None,
    batch_size: int,
) -> float:
    """Bytes that the network and its steps on batches of `batch_size` images of the largest size
    take. Raises torch.OutOfMemoryError."""
    config = _with(config, batch_size=batch_size, accumulate=1)
    counter = _GpuBytes(device) if device.type == "cuda" else _TensorBytes()
    with counter:
        dtype = amp_dtype or torch.float32
        loader, _ = make_loaders(inputs, config, dtype, device, pixels)
        model = build(config, len(inputs.photos.classes), backend, device)
        training = make_training(config, inputs, model, loader, backend, amp_dtype)
        fed = ViewLoader(loader) if isinstance(loader, ResidentLoader) else loader
        epoch = config.optim.epochs  # the images have grown to their last size, nothing is frozen
        training.begin(epoch, loader.size_at(epoch))
        with closing(fed.epoch(epoch)) as batches:
            batch = next(batches)
            for number in range(TRIAL_STEPS):
                training.train_step(batch, epoch, number + 1).finish()
        del training, model, batch
    return counter.most


class _GpuBytes:
    """`most`: bytes that PyTorch's pool grew by at its peak, while entered."""

    def __init__(self, device: torch.device):
        self.device, self.most = device, 0

    def __enter__(self) -> None:
        self._clean()
        self._before = torch.cuda.memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def __exit__(self, *_: object) -> None:
        self.most = torch.cuda.max_memory_reserved(self.device) - self._before
        self._clean()

    def _clean(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class _TensorBytes(TorchDispatchMode):
    """`most`: bytes of all tensors made while entered that were alive at one time."""

    def __init__(self):
        super().__init__()
        self.most = self._now = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, made)
        return made

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self._now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self._now += size
        self.most = max(self.most, self._now)


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses: of the GPU, or of the machine and the control group this process is
    in. Raises UsageError where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        raise UsageError(
            "--auto-batch knows how much memory is free on Linux alone: give --batch-size"
        ) from None
    return min([free, *group_rooms(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def group_rooms(root: Path, of_process: Path) -> list[int]:
    """Bytes up to the limit of each control group, of version 2 or 1, that holds this process; what
    the system can take back of a group, its cached files, counts as free."""
    try:
        paths = [line.split(":", 2) for line in of_process.read_text().splitlines()]
    except OSError:
        return []
    rooms = []
    for _, controllers, path in paths:
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        names = ("memory.max", "memory.current", "inactive_file")
        if controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top) and (room := _room(folder, *names)) is not None:
                rooms.append(room)
    return rooms


def _room(folder: Path, limit: str, used: str, cached: str) -> int | None:
    """None for a group without a limit, and for what is no group."""
    try:
        stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        most, now = int((folder / limit).read_text()), int((folder / used).read_text())
    except (OSError, ValueError):
        return None
    return max(0, most - now + int(stats.get(cached, 0)))
