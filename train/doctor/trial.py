"""What a remedy brings: `--try` trains the recipe with it and without it, `--fix` starts the run
again with it."""

import itertools
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t
from torch import nn
from tqdm import tqdm

from models import Backend
from train import run
from train.config import Config, check, from_dict
from train.data.augment import order
from train.data.loader import Loader
from train.doctor.diagnose import Diagnosis
from train.doctor.measures import auc, log_classes
from train.doctor.signals import Signals
from train.environment import choose_amp, choose_device, prepare
from train.errors import DataError, UsageError
from train.inputs import Inputs, load_inputs, make_loaders
from train.loop import Listener, evaluate, evaluating, fit
from train.metrics import probabilities
from train.range_test import find_rate
from train.training import NonFiniteLoss, Step, Training

SEEDS = 3  # pairs: the fewest whose spread says something
STEPS = 200  # of each training at least, where the run itself is as long
CLEAN = 512  # training photos at most, on which the loss is measured
WORST = 2.0  # times ln K: a higher loss, or one that is none, counts as that, or one run that blew
# up would decide alone
JUDGED_BY = {  # all other rules: by the loss on clean training photos
    "bn_small_batch": "validation accuracy",
    "failing_class": "lowest ROC-AUC of a class",
    "geometry": "validation accuracy",
    "overfit": "validation accuracy",
}
LOSS = "loss on clean training photos"


@dataclass(frozen=True)
class Effect:
    """What a remedy changed: `measure` of each pair of trainings, without it and with it, by seed;
    the mean difference and its 95 % interval (paired t)."""

    measure: str
    without: Sequence[float]
    with_it: Sequence[float]
    difference: float
    low: float
    high: float

    @property
    def helps(self) -> bool:
        """Whether the whole interval is on the better side."""
        return self.high < 0 if self.measure == LOSS else self.low > 0

    @property
    def harms(self) -> bool:
        return self.low > 0 if self.measure == LOSS else self.high < 0

    def told(self) -> str:
        """The effect in a sentence."""
        verdict = "no effect shown: the interval holds 0"
        if self.helps:
            verdict = "the remedy helps"
        elif self.harms:
            verdict = "the remedy makes it worse"
        return (
            f"{self.measure}: {np.mean(self.without):.3f} without, {np.mean(self.with_it):.3f} "
            f"with the remedy, difference {self.difference:+.3f} (95 % interval {self.low:+.3f} to "
            f"{self.high:+.3f}, {len(self.without)} paired seeds): {verdict}"
        )


def compare(measure: str, without: Sequence[float], with_it: Sequence[float]) -> Effect:
    """The effect over pairs of trainings, at least two: Student's t on their differences."""
    differences = np.subtract(with_it, without)
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    half = float(t.ppf(0.975, len(differences) - 1)) * error
    return Effect(measure, without, with_it, mean, mean - half, mean + half)


def remedy_of(found: Sequence[Diagnosis]) -> tuple[Diagnosis, list[str]]:
    """The primary finding, and the flags of its command. Raises UsageError where it has none."""
    primary = next((diagnosis for diagnosis in found if diagnosis["primary"]), None)
    if primary is None:
        raise UsageError("no PROBLEM was found: there is nothing to try or to fix")
    words = shlex.split(primary["command"] or "")
    if words[:3] != ["python", "-m", "train.run"]:
        raise UsageError(
            f"the remedy of {primary['rule']} is no command: {primary['remedy']}, then train anew"
        )
    return primary, words[3:]


def try_remedy(
    folder: Path,
    signals: Signals,
    found: Sequence[Diagnosis],
    *,
    seeds: int = SEEDS,
    epochs: int | None = None,
) -> Effect:
    """Train the run's recipe and the primary remedy's from the same `seeds`, on the run's own
    split, and compare what the rule is about.

    epochs: of each training; by default until the finding was first seen, STEPS steps at least,
    and no more than the run's own. Raises UsageError and DataError.
    """
    primary, flags = remedy_of(found)
    if seeds < 2:
        raise UsageError(f"--seeds {seeds}: a spread needs at least 2")
    if epochs is not None and epochs < 1:
        raise UsageError(f"--epochs must be at least 1, not {epochs}")
    before, after = from_dict(signals.start["config"]), run.parse(flags)
    check(before)
    if _measured(before) != _measured(after):
        raise UsageError(
            f"the remedy of {primary['rule']} changes what is measured, not how it is trained, so "
            "there is nothing to compare: start it with --fix"
        )
    measure = JUDGED_BY.get(primary["rule"], LOSS)
    device = choose_device(before.run.device)
    prepare(before.run)
    inputs = load_inputs(before)
    split = folder / "split.csv"
    if not split.exists() or split.read_bytes() != inputs.split_csv():
        raise DataError(
            f"the photos, labels or their split are not those of {split} any more: restore the "
            "data, or train anew"
        )
    if measure != LOSS and not len(inputs.split.val):
        raise UsageError(f"{primary['rule']} is judged by validation, and the run has none")
    others = inputs if after.data == before.data else load_inputs(after)
    if after.optim.lr == "find":
        after = _with_found_rate(others, after, device)
    per_epoch = signals.start["steps_per_epoch"]
    if epochs is None:
        needed = math.ceil(max(STEPS, primary["first_step"]) / per_epoch)
        epochs = min(signals.start["epochs"], needed)
    first = before.run.seed
    print(f"trying {primary['command']}: {epochs} epochs, seeds {first} to {first + seeds - 1}")
    values: tuple[list[float], list[float]] = ([], [])
    cap = WORST * log_classes(signals)
    with tqdm(total=2 * seeds * epochs, desc="trying the remedy", unit="epoch") as bar:
        for seed, arm in itertools.product(range(first, first + seeds), (0, 1)):
            config = _shortened((before, after)[arm], seed, epochs)
            done = bar.n
            value = _result((inputs, others)[arm], config, device, measure, cap, _Bar(bar))
            bar.update(done + epochs - bar.n)  # one that ended early counts as done
            values[arm].append(value)
    return compare(measure, *values)


def start_again(folder: Path, found: Sequence[Diagnosis]) -> int:
    """Run the primary remedy's command into a new folder beside `folder`; returns the exit code.

    Raises UsageError where there is none.
    """
    _, flags = remedy_of(found)
    folder = folder.resolve()
    names = (folder.with_name(f"{folder.name}-fixed-{n:03d}") for n in itertools.count(1))
    flags += ["--out", str(next(name for name in names if not name.exists()))]
    print("starting", shlex.join(["python", "-m", "train.run", *flags]), flush=True)
    return run.main(flags)


class _Bar(Listener):
    """Moves a bar of epochs, with the time left."""

    def __init__(self, bar: tqdm):
        self.bar = bar
        self.whole, self.steps = bar.n, 1

    def epoch_started(self, epoch: int, steps: int) -> None:
        self.steps = steps

    def step_ended(self, step: Step) -> None:
        self.bar.set_postfix_str(f"loss {step.loss:.3g}, step {step.number}/{self.steps}", False)

    def epoch_ended(self, training: Training, record: dict) -> None:
        self.bar.update()


def _measured(config: Config) -> tuple:
    """What two recipes must share to be compared by one number."""
    data = config.data
    split = (data.split, data.accept_leak, data.val_fraction, data.fold, data.folds)
    return (data.data, data.classes, data.relabel, data.limit, *split)


def _shortened(config: Config, seed: int, epochs: int) -> Config:
    return replace(
        config,
        optim=replace(config.optim, epochs=epochs),
        run=replace(config.run, seed=seed),
    )


def _with_found_rate(inputs: Inputs, config: Config, device: torch.device) -> Config:
    """The recipe with the rate that --lr find finds for the run's own seed, which all pairs then
    train with: the test is a part of the remedy, and takes as long as a training."""
    amp_dtype = choose_amp(config.run.amp, device)
    loader, _ = make_loaders(inputs, config, amp_dtype or torch.float32, device)
    model = _network(inputs, config, device)
    found = find_rate(model, config.optim, loader, amp_dtype, inputs.train_counts())
    print(f"--lr find: {found.suggestion:g} ({found.reason})")
    return replace(config, optim=replace(config.optim, lr=found.suggestion))


def _network(inputs: Inputs, config: Config, device: torch.device) -> nn.Module:
    torch.manual_seed(config.run.seed)
    return run.build(config, len(inputs.train_counts()), Backend("eager", "a trial"), device)


def _result(
    inputs: Inputs,
    config: Config,
    device: torch.device,
    measure: str,
    cap: float,
    listener: Listener,
) -> float:
    """Train once, and measure."""
    amp_dtype = choose_amp(config.run.amp, device)
    loader, val_loader = make_loaders(inputs, config, amp_dtype or torch.float32, device)
    counts = inputs.train_counts()
    training = Training(
        _network(inputs, config, device),
        config.optim,
        total_steps=config.optim.epochs * len(loader),
        amp_dtype=amp_dtype,
        mixup_alpha=config.data.mixup,
        cutmix_alpha=config.data.cutmix,
        seed=config.run.seed,
        class_counts=counts,
    )
    try:
        fit(training, loader, None, len(counts), [listener])
    except NonFiniteLoss:
        return cap if measure == LOSS else 0.0
    shown = val_loader if measure != LOSS else _clean(inputs, config, amp_dtype, device)
    with evaluating(training) as network:
        logits, labels = evaluate(training, network, shown)
    if measure == LOSS:
        loss = F.cross_entropy(logits.double(), labels).item()
        return min(loss, cap) if math.isfinite(loss) else cap
    if measure == "validation accuracy":
        return (logits.argmax(1) == labels).double().mean().item()
    scores, truth = probabilities(logits.numpy()), labels.numpy()
    areas = [auc(scores[:, k], truth == k) for k in range(len(counts))]
    return min(area for area in areas if area is not None)


def _clean(
    inputs: Inputs, config: Config, amp_dtype: torch.dtype | None, device: torch.device
) -> Loader:
    """Training photos as validation sees them, the same for every seed."""
    train = inputs.split.train
    return Loader(
        inputs.images,
        inputs.photos.labels,
        train[order(len(train), 0, 0)[:CLEAN]],
        batch_size=config.optim.val_batch_size,
        image_size=config.data.image_size,
        dtype=amp_dtype or torch.float32,
        channels_last=config.run.channels_last,
        workers=0,
        device=device,
    )
