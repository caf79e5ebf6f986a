"""--tensorboard: the curves and the first training batch as events in the run's folder, for
`tensorboard --logdir RUN_DIR`."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2

from train.errors import UsageError
from train.loop import Listener
from train.training import Step, Training

FOLDER = "tensorboard"  # in that of the run
CURVES = {
    "train_loss": "loss/train",
    "val_loss": "loss/validation",
    "train_accuracy": "accuracy/train",
    "val_accuracy": "accuracy/validation",
    "learning_rate": "learning rate",
    "images_per_second": "images per second",
}


class TensorBoard(Listener):
    """Writes the loss of each step and the curves of each epoch, all over the steps of the run.

    Raises UsageError where the package is missing. When its files cannot be written it warns, and
    the training goes on without them.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                f"--tensorboard needs a package ({error}): pip install 'tensorboard>=2.18'"
            ) from error
        self._make = SummaryWriter
        self._writer: Any = None
        self._before = 0  # steps in front of this epoch

    def run_started(self, folder: Path, training: Training) -> None:
        def start() -> None:
            # what a killed run wrote after its last checkpoint does not count
            self._writer = self._make(str(folder / FOLDER), purge_step=training.steps)
            if training.steps == 0 and (folder / "batch.png").is_file():
                picture = cv2.imread(str(folder / "batch.png"))[..., ::-1]
                self._writer.add_image("training batch", picture, 0, dataformats="HWC")

        self._try(start)

    def epoch_started(self, epoch: int, steps: int) -> None:
        self._before = (epoch - 1) * steps

    def step_ended(self, step: Step) -> None:
        self._write("loss/step", step.loss, self._before + step.number)

    def paused(self, training: Training, stopping: bool) -> None:
        self._flush()

    def epoch_ended(self, training: Training, record: dict[str, Any]) -> None:
        for name, tag in CURVES.items():
            if record[name] is not None:
                self._write(tag, record[name], training.steps)
        self._flush()

    def ended(self, error: Exception | None) -> None:
        if self._writer is not None:
            self._try(self._writer.close)

    def _write(self, tag: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._try(lambda: self._writer.add_scalar(tag, value, step))

    def _flush(self) -> None:
        if self._writer is not None:
            self._try(self._writer.flush)

    def _try(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:  # its thread may raise anything, and none may end a training
            self._writer = None
            warnings.warn(f"TensorBoard's files are not written any more ({error})", stacklevel=1)
