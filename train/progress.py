"""What the terminal shows while a run trains: a bar an epoch and a line an epoch."""

import sys
import time
from typing import Any

from tqdm import tqdm

from train.loop import Listener
from train.training import Step, Training


class Progress(Listener):
    """images/s, loss, accuracy and the time left for the whole run."""

    def __init__(self, epochs: int, done: int = 0):
        self.epochs = epochs
        self.done = done
        self.bar: tqdm | None = None
        self.started = time.perf_counter()
        self.first: float | None = None  # epochs done before the first step seen

    def epoch_started(self, epoch: int, steps: int) -> None:
        self.epoch_steps = steps
        self.images = 0
        self.epoch_began = time.perf_counter()
        self.loss = self.correct = 0.0
        self.bar = tqdm(
            total=steps,
            desc=f"epoch {epoch}/{self.epochs}",
            unit="step",
            leave=False,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {postfix}",
        )

    def step_ended(self, step: Step) -> None:
        self.images += step.images
        self.bar.update(step.number - self.bar.n)  # more than one where an epoch is taken up again
        if self.first is None:
            self.first = self.done + (step.number - 1) / self.epoch_steps
        # not before every drawing of the bar: the text takes longer to make than a short step
        if step.number % max(1, self.epoch_steps // 20) and step.number > 2:
            return
        now = time.perf_counter()
        fraction = step.number / self.epoch_steps
        ahead = self.epochs - self.done - fraction
        behind = self.done + fraction - self.first
        left = (now - self.started) / behind * ahead
        self.bar.set_postfix_str(
            f"{self.images / (now - self.epoch_began):.1f} images/s, "
            f"loss {step.loss:.3f}, "
            f"accuracy {step.correct / step.images:.0%}, "
            f"{tqdm.format_interval(left)} left",
            refresh=False,
        )

    def epoch_ended(self, training: Training, record: dict[str, Any]) -> None:
        self.bar.close()
        self.done += 1
        line = (
            f"epoch {record['epoch']:>3}/{self.epochs}  "
            f"train loss {record['train_loss']:.4f} accuracy {record['train_accuracy']:6.1%}"
        )
        if record["val_loss"] is not None:
            line += f"  val loss {record['val_loss']:.4f} accuracy {record['val_accuracy']:6.1%}"
        line += f"  {record['images_per_second']:7.1f} images/s  {record['seconds']:6.1f} s"
        print(line, flush=True)
