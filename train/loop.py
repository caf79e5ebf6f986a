"""The training loop: it feeds the training step; everything else that happens is a listener."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from profiling import nvtx
from train import distributed, precise_bn
from train.data.loader import Loader
from train.data.resident import ResidentLoader, ViewLoader
from train.errors import Stopped
from train.metrics import fit_temperature
from train.optim import learning_rate
from train.stop import Stop
from train.training import NonFiniteLoss, Step, Training, Underway

LATE = 4  # steps a GPU may be behind the host before the host waits for it


class Listener:
    """What happens around the steps; override what you need.

    A GPU's `step_ended` comes some steps late, so that the host need not wait for it.
    """

    def run_started(self, folder: Path, training: Training) -> None: ...

    def epoch_started(self, epoch: int, steps: int) -> None: ...

    def step_ended(self, step: Step) -> None: ...

    def paused(self, training: Training, stopping: bool) -> None:
        """No step is under way: what `training` holds can be saved. `stopping`: nothing follows."""

    def evaluated(self, logits: Tensor, labels: Tensor) -> None: ...

    def epoch_ended(self, training: Training, record: dict[str, Any]) -> None: ...

    def ended(self, error: NonFiniteLoss | None) -> None: ...


def fit(
    training: Training,
    train_loader: Loader | ResidentLoader | ViewLoader,
    val_loader: Loader | ResidentLoader | None,
    num_classes: int,
    listeners: Sequence[Listener],
    stop: Stop | None = None,
    steps_per_pause: int = 0,
    flips: bool = False,
    norm_loader: Loader | None = None,
) -> None:
    """Train from where `training` stands to the configured number of epochs, and pause every so
    many steps of an epoch; 0 is never. flips: how it is validated, see `logits_of`. norm_loader:
    the photos by which the norms of a moving average are measured, see `precise_bn`; without them
    it keeps the average of the running statistics.

    Raises NonFiniteLoss, and Stopped, after a last pause, when `stop` asks for it.
    """
    stop = stop or Stop()
    try:
        _fit(
            training,
            train_loader,
            val_loader,
            num_classes,
            listeners,
            stop,
            steps_per_pause,
            flips,
            norm_loader,
        )
    except Stopped:
        for listener in listeners:
            listener.paused(training, stopping=True)
        raise
    except NonFiniteLoss as error:
        for listener in listeners:
            listener.ended(error)
        raise
    for listener in listeners:
        listener.ended(None)


def _fit(
    training: Training,
    train_loader: Loader | ResidentLoader,
    val_loader: Loader | ResidentLoader | None,
    num_classes: int,
    listeners: Sequence[Listener],
    stop: Stop,
    steps_per_pause: int,
    flips: bool,
    norm_loader: Loader | None,
) -> None:
    for epoch in range(len(training.history) + 1, training.config.epochs + 1):
        for listener in listeners:
            listener.epoch_started(epoch, len(train_loader))
        with nvtx.range("epoch", epoch):
            trained = train_epoch(training, train_loader, epoch, listeners, stop, steps_per_pause)
        record = {"epoch": epoch, **trained}
        record |= {"val_loss": None, "val_accuracy": None}
        if training.average is not None and norm_loader is not None:
            with nvtx.range("norms", epoch), evaluating(training) as model:
                precise_bn.measure(training, model, norm_loader)
        if val_loader is not None:
            with nvtx.range("validation", epoch), evaluating(training) as model:
                logits, labels = evaluate(training, model, val_loader, stop, flips)
                for listener in listeners:
                    listener.evaluated(logits, labels)
            confusion = count_confusion(logits, labels, num_classes)
            accuracy = confusion.diagonal().sum().item() / len(labels)
            record |= {
                "val_loss": F.cross_entropy(logits.double(), labels).item(),
                "val_accuracy": accuracy,
            }
            training.temperature = fit_temperature(logits.numpy(), labels.numpy())
            if training.best is None or accuracy > training.best["val_accuracy"]:
                best = {"epoch": epoch, "val_accuracy": accuracy, "confusion": confusion.tolist()}
                training.best = best
        training.history.append(record)
        for listener in listeners:
            listener.epoch_ended(training, record)


def train_epoch(
    training: Training,
    loader: Loader | ResidentLoader | ViewLoader,
    epoch: int,
    listeners: Sequence[Listener],
    stop: Stop | None = None,
    steps_per_pause: int = 0,
) -> dict[str, Any]:
    """All steps of one epoch that are left; the epoch's mean loss, accuracy, learning rate and
    speed. Raises NonFiniteLoss and Stopped."""
    stop, tally = stop or Stop(), training.tally_of(epoch)

    def pause(number: int) -> bool:
        due = steps_per_pause > 0 and number % steps_per_pause == 0
        return stop.agreed() is not None or due

    training.begin(epoch, loader.size_at(epoch))
    while tally.steps < len(loader):
        started = time.perf_counter()
        for step in finished_steps(training, loader, epoch, pause):
            tally.add(step)
            for listener in listeners:
                listener.step_ended(step)
        tally.seconds += time.perf_counter() - started
        if tally.steps < len(loader):
            stop.check()
            for listener in listeners:
                listener.paused(training, stopping=False)
    first = training.steps - tally.steps
    return {
        "train_loss": tally.loss / tally.counted if tally.counted else math.nan,
        "train_accuracy": tally.correct / tally.counted if tally.counted else math.nan,
        "skipped_steps": tally.skipped,
        "learning_rate": learning_rate(training.config, first, training.total_steps),
        "images_per_second": tally.images / tally.seconds,
        "seconds": tally.seconds,
    }


def finished_steps(
    training: Training,
    loader: Loader | ResidentLoader | ViewLoader,
    epoch: int,
    pause: Callable[[int], bool] = lambda number: False,
) -> Iterator[Step]:
    """The steps of one epoch that are left, up to the first whose number, from 1, makes `pause`
    true, as they finish. Raises NonFiniteLoss."""
    late = LATE if training.device.type == "cuda" else 0
    underway: deque[Underway] = deque()
    start = training.tally_of(epoch).steps
    with contextlib.closing(loader.epoch(epoch, start)) as batches:
        for number in range(start + 1, len(loader) + 1):
            with nvtx.range("step", number):
                with nvtx.range("data"):
                    batch = next(batches)
                underway.append(training.train_step(batch, epoch, number))
            if pause(number):
                break
            if len(underway) > late:
                yield training.finish(underway.popleft())
    while underway:
        yield training.finish(underway.popleft())


@contextlib.contextmanager
def evaluating(training: Training) -> Iterator[nn.Module]:
    """The model in eval mode with the weights to use; the training weights come back afterwards."""
    training.model.eval()
    if training.average is None:
        yield training.model
        return
    own = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.model.load_state_dict(training.average.state)
    try:
        yield training.model
    finally:
        training.model.load_state_dict(own)


@torch.inference_mode()
def evaluate(
    training: Training,
    model: nn.Module,
    loader: Loader | ResidentLoader,
    stop: Stop | None = None,
    flips: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits float32 [N, K] and labels int64 [N] of all images of `loader`, on the CPU; `flips`:
    see `logits_of`. Each process evaluates its shares, and has all results. Raises Stopped."""
    stop = stop or Stop()
    logits, labels = [], []
    for batch in loader.epoch(0):
        stop.check()
        with training.autocast():
            logits.append(logits_of(model, batch.images, flips).float())
        labels.append(batch.labels)
    found = torch.cat(logits).cpu(), torch.cat(labels).cpu()
    return found if distributed.size() == 1 else gathered(loader.shares, *found)


def gathered(
    shares: Sequence[tuple[int, int]], logits: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The logits and labels of all processes, in the order of the photos; `shares` are the first
    and last places of those of this process, batch by batch."""
    places = torch.cat([torch.arange(first, last) for first, last in shares])
    parts = distributed.gathered((places, logits, labels))
    places, logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    order = places.argsort()
    return logits[order], labels[order]


def logits_of(forward: Callable[[Tensor], Tensor], images: Tensor, flips: bool) -> Tensor:
    """The logits [N, K] of images [N, 3, H, W]; with `flips` the mean of those and of their mirror
    images'."""
    return (forward(images) + forward(images.flip(3))) / 2 if flips else forward(images)


def count_confusion(logits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts int64 [true class, predicted class]."""
    pairs = labels * num_classes + logits.argmax(1)
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
