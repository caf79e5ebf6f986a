"""The training loop: one fenced training step; everything else that happens is a listener."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from train.config import OptimConfig
from train.data.augment import mixup
from train.data.loader import Batch, Loader
from train.errors import LapisError
from train.graphs import graphed_forward
from train.optim import WeightAverage, build_optimizer, build_schedule


class NonFiniteLoss(LapisError):
    """The loss of a step was NaN or infinite; `indices` are the rows of its images."""

    exit_code = 5

    def __init__(self, epoch: int, step: int, indices: Tensor):
        super().__init__(f"the loss is not finite in epoch {epoch}, step {step}")
        self.indices = indices.tolist()


@dataclass(frozen=True)
class Step:
    """What a listener learns of a finished step; the tensors are 0-dimensional, on the device."""

    number: int
    images: int
    loss: Tensor
    correct: Tensor


class Listener:
    """What happens around the steps; override what you need."""

    def epoch_started(self, epoch: int, steps: int) -> None: ...

    def step_ended(self, step: Step) -> None: ...

    def epoch_ended(self, training: "Training", record: dict[str, Any]) -> None: ...


class Training:
    """Everything that changes while a run trains: what a checkpoint holds.

    model: on its device already. total_steps: steps of the whole run, for the schedule.
    amp_dtype: bfloat16, float16 or None for full precision. cuda_graph: replay forward and backward
        from a CUDA graph, captured at the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        *,
        total_steps: int,
        amp_dtype: torch.dtype | None,
        mixup_alpha: float = 0.0,
        seed: int = 0,
        cuda_graph: bool = False,
    ):
        self.model = model
        self.forward: Callable[[Tensor], Tensor] | None = None if cuda_graph else model
        self.config = config
        self.device = next(model.parameters()).device
        self.amp_dtype = amp_dtype
        self.mixup_alpha = mixup_alpha
        self.seed = seed
        self.optimizer = build_optimizer(model, config)
        self.schedule = build_schedule(self.optimizer, config, total_steps)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=amp_dtype == torch.float16, init_scale=2.0**14
        )
        self.average = WeightAverage(model, config.ema) if config.ema else None
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision for a forward pass, or nothing when it is off."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.amp_dtype)

    def train_step(self, batch: Batch, epoch: int, number: int) -> Step:
        """One update of the weights from one batch."""
        self.model.train()
        lam, permutation = mixup(
            len(batch.labels), self.mixup_alpha, seed=self.seed, epoch=epoch, batch=number
        )
        images, labels, others = batch.images, batch.labels, None
        if lam < 1.0:
            permutation = torch.from_numpy(permutation).to(self.device)
            images, others = images.lerp(images[permutation], 1.0 - lam), labels[permutation]

        if self.forward is None:
            self.forward = self._capture(images)

        # ---- the training step ------------------------------------------------------------------
        with self.autocast():
            logits = self.forward(images)
        loss = self.loss(logits, labels)
        if others is not None:
            loss = lam * loss + (1.0 - lam) * self.loss(logits, others)
        self.scaler.scale(loss).backward()
        # without a scaler a bad loss would reach the weights; the scaler skips such a step itself
        if not self.scaler.is_enabled() and not torch.isfinite(loss):
            raise NonFiniteLoss(epoch, number, batch.indices)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model)
        # ------------------------------------------------------------------------------------------

        with torch.no_grad():
            predicted = logits.argmax(1)
            correct = (predicted == labels).sum()
            if others is not None:
                correct = lam * correct + (1.0 - lam) * (predicted == others).sum()
        return Step(number, len(labels), loss.detach(), correct)

    def _capture(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        tqdm.write("compiling the kernels and capturing the step: up to half a minute, once")
        try:
            return graphed_forward(self.model, images, self.amp_dtype)
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            warnings.warn(f"no CUDA graph ({reason}): every kernel is launched", stacklevel=2)
            return self.model

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in float32. logits [N, K], labels int64 [N]."""
        smoothing = self.config.label_smoothing
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)

    def weights(self) -> dict[str, Tensor]:
        """The weights to use: the moving average where there is one."""
        return self.model.state_dict() if self.average is None else self.average.state

    def state(self) -> dict[str, Any]:
        """Tensors and primitives from which `restore` continues exactly."""
        return {
            "weights": self.weights(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average_updates": 0 if self.average is None else self.average.updates,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "history": self.history,
            "best": self.best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned. Raises RuntimeError when the model is another."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            for name, value in self.average.state.items():
                value.copy_(state["weights"][name])
            self.average.updates = state["average_updates"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.history = state["history"]
        self.best = state["best"]


def fit(
    training: Training,
    train_loader: Loader,
    val_loader: Loader | None,
    num_classes: int,
    listeners: Sequence[Listener],
) -> None:
    """Train from the epoch after the history's last to the configured number of epochs."""
    for epoch in range(len(training.history) + 1, training.config.epochs + 1):
        for listener in listeners:
            listener.epoch_started(epoch, len(train_loader))
        record = {"epoch": epoch, **train_epoch(training, train_loader, epoch, listeners)}
        record |= {"val_loss": None, "val_accuracy": None}
        if val_loader is not None:
            with evaluating(training) as model:
                loss, confusion = evaluate(training, model, val_loader, num_classes)
            accuracy = confusion.diagonal().sum().item() / confusion.sum().item()
            record |= {"val_loss": loss, "val_accuracy": accuracy}
            if training.best is None or accuracy > training.best["val_accuracy"]:
                best = {"epoch": epoch, "val_accuracy": accuracy, "confusion": confusion.tolist()}
                training.best = best
        training.history.append(record)
        for listener in listeners:
            listener.epoch_ended(training, record)


def train_epoch(
    training: Training, loader: Loader, epoch: int, listeners: Sequence[Listener]
) -> dict[str, Any]:
    """All steps of one epoch; the epoch's mean loss, accuracy, learning rate and speed."""
    started = time.perf_counter()
    loss = torch.zeros((), dtype=torch.float64, device=training.device)
    correct = torch.zeros((), dtype=torch.float64, device=training.device)
    images = 0
    learning_rate = training.schedule.get_last_lr()[0]
    for number, batch in enumerate(loader.epoch(epoch), start=1):
        step = training.train_step(batch, epoch, number)
        loss += step.loss * step.images
        correct += step.correct
        images += step.images
        for listener in listeners:
            listener.step_ended(step)
    record = {"train_loss": loss.item() / images, "train_accuracy": correct.item() / images}
    seconds = time.perf_counter() - started
    speed = {"images_per_second": images / seconds, "seconds": seconds}
    return {**record, "learning_rate": learning_rate, **speed}


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
    training: Training, model: nn.Module, loader: Loader, num_classes: int
) -> tuple[float, Tensor]:
    """Mean cross-entropy (without smoothing) and counts int64 [true class, predicted class]."""
    total = torch.zeros((), dtype=torch.float64, device=training.device)
    confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=training.device)
    for batch in loader.epoch(0):
        with training.autocast():
            logits = model(batch.images)
        total += F.cross_entropy(logits.float(), batch.labels, reduction="sum")
        pairs = batch.labels * num_classes + logits.argmax(1)
        confusion += torch.bincount(pairs, minlength=num_classes**2)
    confusion = confusion.view(num_classes, num_classes).cpu()
    return total.item() / confusion.sum().item(), confusion
