"""What changes while a run trains, one step after the other."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train import distributed
from train.config import OptimConfig
from train.data.augment import cutmix, mixup
from train.data.loader import Batch
from train.data.resident import Views
from train.errors import LapisError
from train.graphs import CapturedStep
from train.optim import learning_rate, set_rate
from train.step import TrainingStep, autocast, class_weights

PATIENCE = 3  # losses in a row that may be infinite under float16, whose range a forward can leave


class NonFiniteLoss(LapisError):
    """The loss of a step was NaN or infinite; `indices` are the rows of its images."""

    exit_code = 5

    def __init__(self, epoch: int, step: int, indices: Tensor):
        super().__init__(f"the loss is not finite in epoch {epoch}, step {step}")
        self.indices = indices.tolist()


@dataclass(frozen=True)
class Step:
    """What a listener learns of a finished step: its number in the epoch, its images, their mean
    loss, how many were classified right, and whether the update was skipped."""

    number: int
    images: int
    loss: float
    correct: float
    skipped: bool


@dataclass
class Tally:
    """What the finished steps of one epoch add up to: sums over their images, and seconds.

    counted: images of the steps whose loss was finite, over which `loss` and `correct` are summed.
    """

    epoch: int
    steps: int = 0
    images: int = 0
    counted: int = 0
    skipped: int = 0
    loss: float = 0.0
    correct: float = 0.0
    seconds: float = 0.0

    def add(self, step: Step) -> None:
        """Count one more step."""
        self.steps += 1
        self.images += step.images
        self.skipped += step.skipped
        if math.isfinite(step.loss):
            self.counted += step.images
            self.loss += step.loss * step.images
            self.correct += step.correct


class Underway:
    """A step that the device may not have finished; its outcome comes to the host by itself.
    indices: the rows of its images, on all processes together."""

    def __init__(self, epoch: int, number: int, indices: Tensor, outcome: Tensor):
        self.epoch = epoch
        self.number = number
        self.indices = indices
        self._outcome = outcome.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if outcome.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def finish(self) -> Step:
        """Wait until the device has finished the step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, correct, skipped = self._outcome.tolist()
        return Step(self.number, len(self.indices), loss, correct, bool(skipped))


class Training:
    """Everything that changes while a run trains: what a checkpoint holds.

    model: on its device already. total_steps: steps of the whole run, for the schedule.
    amp_dtype: bfloat16, float16 or None for full precision. fused: update the weights by our
        kernels; make_batch: make the batches inside the step; see `TrainingStep`. class_counts:
        training images of each class, for the loss `weighted_ce`. cuda_graph: replay the step
        from a CUDA graph, captured at the first batch.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        *,
        total_steps: int,
        amp_dtype: torch.dtype | None,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        seed: int = 0,
        fused: bool = False,
        make_batch: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        class_counts: Sequence[int] | None = None,
        cuda_graph: bool = False,
    ):
        self.model = model
        self.config = config
        self.device = next(model.parameters()).device
        self.on_cuda = self.device.type == "cuda"
        self.amp_dtype = amp_dtype
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.seed = seed
        self.total_steps = total_steps
        self.steps = 0
        weights = None if class_counts is None else class_weights(class_counts).to(self.device)
        self.step = TrainingStep(model, config, amp_dtype, fused, make_batch, weights)
        self.average = self.step.average
        self.run_step = CapturedStep(self.step) if cuda_graph else self.step
        self.work: tuple[bool, int] | None = None  # of a step: layers frozen, image size
        self.bad: list[Underway] = []  # the latest steps, while their losses are not finite
        self.tally = Tally(epoch=0)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.temperature = 1.0  # of the weights to use, where something validated them

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision for a forward pass, or nothing when it is off."""
        return autocast(self.device, self.amp_dtype)

    def tally_of(self, epoch: int) -> Tally:
        """The sums over `epoch` so far: those of a checkpoint within it, else new ones."""
        if self.tally.epoch != epoch:
            self.tally = Tally(epoch)
        return self.tally

    def begin(self, epoch: int, image_size: int) -> None:
        """Put the model in training mode, in the first `freeze_epochs` its last layer alone: the
        others then keep their running statistics too."""
        self.model.train()
        frozen = epoch <= self.config.freeze_epochs
        if self.config.freeze_epochs:
            for module in self.model.children():
                if module is not self.model.fc and any(True for _ in module.parameters()):
                    module.requires_grad_(not frozen).train(not frozen)
        work = frozen, image_size
        if self.work not in (None, work) and isinstance(self.run_step, CapturedStep):
            self.run_step.forget()
        self.work = work
        self.step.refresh(anew=True)  # somebody may have written to weights in uncounted ways

    def learning_rate(self) -> float:
        """That of the next step."""
        return learning_rate(self.config, self.steps, self.total_steps)

    def train_step(self, batch: Batch | Views, epoch: int, number: int) -> Underway:
        """One update of the weights from one batch; `model` must be in training mode."""
        set_rate(self.step.optimizer, self.learning_rate())
        self.steps += 1
        if self.average is not None:
            self.average.prepare(self.steps)
        self.step.whole = len(batch.indices)
        mixing = self.mixing(batch.share, epoch, number)
        outcome = self.run_step(*batch.inputs, *mixing)
        return Underway(epoch, number, batch.indices, outcome)

    def mixing(self, size: int, epoch: int, number: int) -> tuple[Tensor, ...]:
        """What the step takes besides a batch of `size` images: the partner of each, the share it
        keeps and with cutmix the box; nothing where neither mixup nor cutmix is on. A process mixes
        the images of its share among themselves; share and box are the same on all."""
        if not self.mixup_alpha and not self.cutmix_alpha:
            return ()
        key = {"seed": self.seed, "epoch": epoch, "batch": number}
        lam, partner = mixup(size, self.mixup_alpha, **key)
        box = np.zeros(4, np.float32)
        chance = np.random.default_rng((self.seed, epoch, number, 2)).random()
        if self.cutmix_alpha and (not self.mixup_alpha or chance < 0.5):
            lam = 1.0
            box, partner = cutmix(size, self.cutmix_alpha, **key)
        # in 256ths both shares are exact in 16 bits: pixels and labels are mixed alike
        share = torch.full((), round(256 * lam) / 256, device=self.device)
        if not self.cutmix_alpha:
            return self._there(partner), share
        return self._there(partner), share, self._there(box)

    def _there(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        if self.on_cuda:  # from memory that is not pinned, a copy would wait
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def finish(self, underway: Underway) -> Step:
        """Wait for a step. Raises NonFiniteLoss, which names the first batch, when its loss was
        not finite; under float16 when that of PATIENCE steps in a row was not."""
        step = underway.finish()
        self.bad = [] if math.isfinite(step.loss) else [*self.bad, underway]
        if len(self.bad) >= (PATIENCE if self.amp_dtype == torch.float16 else 1):
            first = self.bad[0]
            raise NonFiniteLoss(first.epoch, first.number, first.indices)
        return step

    def graph_steps(self) -> dict[str, Any] | None:
        """How many steps came from the CUDA graph, and how many did not, by their reason; None
        without one."""
        if not isinstance(self.run_step, CapturedStep):
            return None
        return {"replayed": self.run_step.replayed, "launched": dict(self.run_step.launched)}

    def weights(self) -> dict[str, Tensor]:
        """The weights to use: the moving average where there is one."""
        return self.model.state_dict() if self.average is None else self.average.state

    def state(self) -> dict[str, Any]:
        """Tensors and primitives from which `restore` continues exactly, on as many processes; all
        of them must call it, since each has random states of its own."""
        on_gpu = [torch.cuda.get_rng_state(self.device)] if self.on_cuda else []
        states = distributed.gathered((torch.get_rng_state(), on_gpu))
        return {
            "weights": self.weights(),
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict()["state"],
            "scale": self.step.scale.tensors(),
            "steps": self.steps,
            "tally": asdict(self.tally),
            "rng": torch.stack([cpu for cpu, _ in states]),
            "cuda_rng": [state for _, gpu in states for state in gpu],
            "history": self.history,
            "best": self.best,
            "temperature": self.temperature,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned. Raises RuntimeError when the model is another."""
        self.model.load_state_dict(state["model"])
        # in place, all of it: a captured step knows its tensors by their addresses
        for number, slots in self.step.optimizer.state_dict()["state"].items():
            for name, value in slots.items():
                value.copy_(state["optimizer"][number][name])
        for tensor, value in zip(self.step.scale.tensors(), state["scale"], strict=True):
            tensor.copy_(value)
        if self.average is not None:
            for name, value in self.average.state.items():
                value.copy_(state["weights"][name])
        self.steps = state["steps"]
        self.tally = Tally(**state["tally"])
        here = distributed.rank()
        torch.set_rng_state(state["rng"][here].clone())  # it crashes on a view into more memory
        if state["cuda_rng"]:
            torch.cuda.set_rng_state(state["cuda_rng"][here], self.device)
        self.history = state["history"]
        self.best = state["best"]
        self.temperature = state["temperature"]
