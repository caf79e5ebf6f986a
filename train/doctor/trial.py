"""What a remedy brings: `--try` trains the recipe with it and without it, `--fix` starts the run
again with it."""

import itertools
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from models import Backend
from train import precise_bn, run
from train.assembly import make_training
from train.config import Config, check, from_dict
from train.data.augment import order
from train.data.loader import Loader
from train.doctor.diagnose import Diagnosis
from train.doctor.effect import LOSS, Effect, compare
from train.doctor.measures import log_classes
from train.doctor.signals import FILE, Signals, append
from train.environment import choose_amp, choose_device, prepare
from train.errors import DataError, UsageError
from train.inputs import Inputs, clean_loader, load_inputs, make_loaders
from train.loop import Listener, evaluate, evaluating, fit
from train.range_test import RangeTest, find_rate
from train.training import NonFiniteLoss, Step, Training
from train.transfer import start_from

EAGER = Backend("eager", "a trial")
SEEDS = 3  # pairs: the fewest whose spread says something
STEPS = 200  # of each training at least, where the run itself is as long
CLEAN = 512  # training photos at most, on which the loss is measured
WORST = 2.0  # times ln K: a higher loss, or one that is none, counts as that, or one run that blew
# up would decide alone
ACCURACY = "validation accuracy"
RECALL = "lowest recall of a class"  # a rare one may be ranked well and never be named
JUDGED_BY = {  # all other rules: by the loss on clean training photos
    "bn_small_batch": ACCURACY,
    "failing_class": RECALL,
    "geometry": ACCURACY,
    "overfit": ACCURACY,
}


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
    and no more than the run's own. The effect is added to `signals` and to their file. Raises
    UsageError, DataError and DiskError.
    """
    primary, flags = remedy_of(found)
    if seeds < 2:
        raise UsageError(f"--seeds {seeds}: a spread needs at least 2")
    if epochs is not None and epochs < 1:
        raise UsageError(f"--epochs must be at least 1, not {epochs}")
    before, after = from_dict(signals.start["config"], FILE), run.parse(flags)
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
    effect = compare(measure, *values)
    append(folder, signals, effect.record(primary["rule"], primary["command"], epochs))
    return effect


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
    found = range_of(inputs, config, device)
    print(f"--lr find: {found.suggestion:g} ({found.reason})")
    return replace(config, optim=replace(config.optim, lr=found.suggestion))


def range_of(inputs: Inputs, config: Config, device: torch.device) -> RangeTest:
    """The range test of a recipe, with the network that its seed begins with. Raises UsageError
    where no rate lowers the loss."""
    amp_dtype = choose_amp(config.run.amp, device)
    loader, _ = make_loaders(inputs, config, amp_dtype or torch.float32, device)
    model = _network(inputs, config, device)
    return find_rate(model, config.optim, loader, amp_dtype, inputs.train_counts())


def _network(inputs: Inputs, config: Config, device: torch.device) -> nn.Module:
    torch.manual_seed(config.run.seed)
    model = run.build(config, len(inputs.train_counts()), EAGER, device)
    start_from(model, config)
    return model


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
    dtype = amp_dtype or torch.float32
    loader, val_loader = make_loaders(inputs, config, dtype, device)
    norm_loader = precise_bn.make_loader(inputs, config, dtype, device)
    model = _network(inputs, config, device)
    training = make_training(config, inputs, model, loader, EAGER, amp_dtype)
    classes = len(inputs.train_counts())
    try:
        fit(training, loader, None, classes, [listener], norm_loader=norm_loader)
    except NonFiniteLoss:
        return cap if measure == LOSS else 0.0
    shown = val_loader if measure != LOSS else _clean(inputs, config, dtype, device)
    with evaluating(training) as network:
        logits, labels = evaluate(training, network, shown)
    if measure == LOSS:
        loss = F.cross_entropy(logits.double(), labels).item()
        return min(loss, cap) if math.isfinite(loss) else cap
    right = (logits.argmax(1) == labels).double()
    if measure == ACCURACY:
        return right.mean().item()
    return min(right[labels == k].mean().item() for k in labels.unique())


def _clean(inputs: Inputs, config: Config, dtype: torch.dtype, device: torch.device) -> Loader:
    """Training photos as validation sees them, the same for every seed."""
    train = inputs.split.train
    rows = train[order(len(train), 0, 0)[:CLEAN]]
    return clean_loader(inputs, config, rows, config.optim.val_batch_size, dtype, device)
