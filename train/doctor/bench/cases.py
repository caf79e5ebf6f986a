"""The trainings of the benchmark: each a fault that is provoked, or a sound recipe, of seconds.

Half of the kinds fix the rules' thresholds, the other half, with other seeds and so other pictures,
scores them. Kinds of one cause are spread over both halves.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from train.config import DEFAULT, REPORT, OptimConfig
from train.doctor.bench.networks import (
    biased,
    changed_by,
    forget,
    leap,
    mean_colour,
    micro,
    narrow,
    never_evaluates,
    never_trains,
    overscaled,
    small_weights,
    stack,
)
from train.doctor.bench.pictures import (
    PHOTOS,
    Pictures,
    changed,
    dishes,
    few_dishes,
    few_photos,
    forty,
    hole,
    leaked,
    look_alike,
    patterns,
    photos,
    random_labels,
    rare,
    unevenly_lit,
)
from train.training import Training

SEEDS = 5  # trainings of a kind
STEADY = replace(
    DEFAULT.optim,
    optimizer="sgd",
    schedule="constant",
    lr=0.05,
    weight_decay=5e-4,
    ema=0.0,
    label_smoothing=0.0,
    batch_size=16,
)
ADAMW = replace(STEADY, optimizer="adamw", lr=2e-3)
COSINE = replace(STEADY, schedule="cosine")
OWN = replace(DEFAULT.optim, batch_size=16)  # the recipe that runs have by themselves
PLAIN = replace(REPORT.optim, lr=0.05, batch_size=16)


@dataclass(frozen=True)
class Case:
    """A kind of training; `causes`: the rules that name its fault right, none for a sound one.

    make: the network. data: the pictures of a seed, of training and of validation. prepare: what
    spoils the training. twins: validation pictures that are training pictures too.
    """

    name: str
    causes: tuple[str, ...] = ()
    make: Callable[[], nn.Module] = micro
    optim: OptimConfig = STEADY
    epochs: int = 10
    data: Callable[[int], tuple[Pictures, Pictures]] = patterns
    prepare: Callable[[Training], None] = lambda training: None
    amp: torch.dtype | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    twins: int = 0


@dataclass(frozen=True)
class Job:
    """The training `number`, from 0, of a kind; `name` is that of its result's file."""

    case: Case
    half: Literal["fixing", "scoring"]
    number: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.case.name}-{self.seed}"


HIGH = ("lr_too_high", "exploding_gradient", "non_finite")
UNTAUGHT = ("stagnation", "overfit", "underfit")
LONG = {"epochs": 13}

# In turn for fixing and for scoring, so that each cause is on both sides
FAULTS: tuple[Case, ...] = (
    Case("rate-sgd", ("lr_too_high",), optim=replace(STEADY, lr=10.0), **LONG),
    Case("rate-adamw", HIGH, lambda: stack(4), optim=replace(ADAMW, lr=0.3), **LONG),
    Case("rate-leaps", HIGH, prepare=leap, **LONG),
    Case("rate-no-norm", HIGH, lambda: stack(4), replace(STEADY, lr=5.0), **LONG),
    Case("tiny-rate-sgd", ("lr_too_low",), optim=replace(STEADY, lr=1e-7), **LONG),
    Case("tiny-rate-adamw", ("lr_too_low",), optim=replace(ADAMW, lr=1e-8), **LONG),
    Case("sigmoids", ("vanishing_gradient",), lambda: stack(34, nn.Sigmoid), **LONG),
    Case(
        "faint-tanh",
        ("vanishing_gradient",),
        changed_by(lambda: stack(20, nn.Tanh), small_weights),
        **LONG,
    ),
    Case(
        "drowned-norms",
        ("dying_relu",),
        changed_by(lambda: micro("micro_plain"), biased(-10.0)),
        replace(STEADY, lr=0.01),
        **LONG,
    ),
    Case(
        "drowned-convolutions",
        ("dying_relu",),
        changed_by(lambda: stack(4), biased(-5.0, nn.Conv2d)),
        replace(STEADY, lr=0.01),
        **LONG,
    ),
    Case("zeros", ("symmetric_init",), lambda: micro(init="zeros"), **LONG),
    Case("constant", ("symmetric_init",), lambda: micro("micro_plain", init="constant"), **LONG),
    Case(
        "frozen-stage",
        ("silent_bug",),
        changed_by(micro, lambda model: model.layer4.requires_grad_(False)),
    ),
    Case("forgotten-parameters", ("silent_bug",), prepare=forget),
    Case("never-trains", ("silent_bug",), prepare=never_trains),
    Case("never-evaluates", ("silent_bug",), prepare=never_evaluates),
    Case(
        "loud-head",
        ("start_loss",),
        changed_by(micro, lambda model: model.fc.weight.mul_(100)),
        replace(STEADY, lr=1e-3),
    ),
    Case(
        "sure-head",
        ("start_loss",),
        changed_by(lambda: micro("micro_plain"), lambda model: model.fc.bias[0].add_(30)),
        replace(ADAMW, lr=1e-3),
    ),
    Case("no-number", ("non_finite", "input"), data=changed(hole)),
    Case("runs-away", HIGH, lambda: stack(34), replace(STEADY, lr=1e12)),
    Case("bytes", ("input",), data=changed(lambda images: images * 50 + 128)),
    Case("faint-pixels", ("input",), data=changed(lambda images: images * 1e-3)),
    Case(
        "forty-pictures",
        ("overfit",),
        optim=replace(STEADY, weight_decay=0.0),
        epochs=24,
        data=forty,
    ),
    Case(
        "few-dishes",
        ("overfit",),
        lambda: micro("micro_plain"),
        replace(ADAMW, weight_decay=0.0),
        epochs=30,
        data=few_dishes,
    ),
    Case("look-alikes", ("failing_class",), epochs=8, data=look_alike),
    Case("rare-class", ("failing_class",), optim=ADAMW, epochs=8, data=rare),
    Case(
        "random-labels", UNTAUGHT, epochs=30, data=random_labels(lambda seed: patterns(seed, 480))
    ),
    Case(
        "random-labels-dishes",
        UNTAUGHT,
        lambda: micro("micro_plain"),
        epochs=24,
        data=random_labels(dishes),
    ),
    Case(
        "batches-of-two",
        ("bn_small_batch", "lr_too_high"),
        optim=replace(STEADY, batch_size=2, lr=0.2),
        epochs=6,
        data=unevenly_lit,
    ),
    Case(
        "batches-of-two-plain",
        ("bn_small_batch", "lr_too_high"),
        lambda: micro("micro_plain"),
        replace(STEADY, batch_size=2, lr=0.1),
        epochs=6,
        data=unevenly_lit,
    ),
    Case("mean-colour", ("underfit", "stagnation"), mean_colour, epochs=30, data=dishes),
    Case(
        "two-filters",
        ("underfit",),
        narrow,
        epochs=30,
        data=dishes,
    ),
    Case("deep-plain", ("vanishing_gradient", "geometry"), lambda: stack(24), **LONG),
    Case("copied-pictures", ("leakage",), data=leaked(40), twins=40),
    Case("overscaled-fp16", ("non_finite",), prepare=overscaled, amp=torch.float16, epochs=8),
    Case("rate-fp16", HIGH, optim=replace(STEADY, lr=10.0), amp=torch.float16, epochs=8),
    Case(
        "tiny-rate-bf16",
        ("lr_too_low",),
        optim=replace(STEADY, lr=1e-7),
        amp=torch.bfloat16,
        **LONG,
    ),
    Case(
        "sigmoids-bf16",
        ("vanishing_gradient",),
        lambda: stack(34, nn.Sigmoid),
        amp=torch.bfloat16,
        **LONG,
    ),
)

PHOTO_FAULTS: tuple[Case, ...] = (
    Case(
        "few-photos",
        ("overfit",),
        lambda: micro("micro_plain"),
        replace(ADAMW, weight_decay=0.0),
        epochs=30,
        data=few_photos,
    ),
    Case("random-labels-photos", UNTAUGHT, epochs=24, data=random_labels(photos)),
)

SOUND: tuple[Case, ...] = (
    Case("own-recipe", optim=OWN),
    Case("own-recipe-plain", make=lambda: micro("micro_plain"), optim=OWN),
    Case("steady"),
    Case("steady-plain", make=lambda: micro("micro_plain")),
    Case("report-recipe", optim=REPORT.optim),
    Case("plain-sgd", make=lambda: micro("micro_plain"), optim=PLAIN),
    Case("adamw", optim=ADAMW),
    Case(
        "adamw-cosine", make=lambda: micro("micro_plain"), optim=replace(ADAMW, schedule="cosine")
    ),
    Case("mixup", optim=OWN, mixup=0.4),
    Case("cutmix", optim=COSINE, cutmix=1.0),
    Case("bf16", amp=torch.bfloat16),
    Case("bf16-adamw", optim=ADAMW, amp=torch.bfloat16),
    Case("batches-of-four", optim=replace(STEADY, batch_size=4, lr=0.01), epochs=4),
    Case("batches-of-eight", optim=replace(ADAMW, batch_size=8), epochs=6),
    Case("decayed-rate", optim=replace(COSINE, lr=0.1), epochs=24),
    Case("stepped-rate", optim=replace(STEADY, schedule="step"), epochs=20),
    Case("cyclic", make=lambda: micro(dropout=0.3), optim=replace(STEADY, schedule="cyclic")),
    Case("dropout", make=lambda: micro("micro_plain", dropout=0.5), optim=COSINE),
    Case("leaky", make=lambda: micro(act="leaky_relu", zero_init_residual=True)),
    Case("gelu", make=lambda: micro(act="gelu"), optim=ADAMW),
    Case("pre-activation", make=lambda: micro(preact=True)),
    Case("silu-plain", make=lambda: micro("micro_plain", act="silu"), optim=COSINE),
    Case(
        "sparse",
        make=changed_by(lambda: micro("micro_plain"), biased(-0.8)),
        optim=COSINE,
    ),
    Case("sparse-residual", make=changed_by(micro, biased(-0.5)), optim=ADAMW),
    Case(
        "imbalanced",
        data=lambda seed: patterns(seed, 240, val=200, shares=(10, 5, 3, 2)),
    ),
    Case(
        "imbalanced-weighted",
        optim=replace(STEADY, loss="weighted_ce"),
        data=lambda seed: patterns(seed, 240, val=200, shares=(8, 4, 4, 2)),
    ),
    Case("focal", optim=replace(STEADY, loss="focal")),
    Case("clipped", optim=replace(STEADY, clip_grad=1.0)),
    Case("no-norm", make=lambda: stack(3), optim=replace(ADAMW, lr=2e-3)),
    Case("group-norm", make=lambda: micro(norm="group")),
    Case("large-batch", optim=replace(OWN, batch_size=64), epochs=24),
    Case("noisy-pictures", optim=OWN, data=lambda seed: patterns(seed, 640, noise=2.0), epochs=6),
    Case("dishes", optim=OWN, data=lambda seed: dishes(seed, 400, 120), epochs=6),
    Case(
        "dishes-mixup", optim=COSINE, mixup=0.3, data=lambda seed: dishes(seed, 400, 120), epochs=6
    ),
    Case("fp16", amp=torch.float16, epochs=6),
    Case("fp16-adamw", optim=ADAMW, amp=torch.float16, epochs=6),
)

PHOTO_SOUND: tuple[Case, ...] = (
    Case("photos", optim=OWN, data=photos, epochs=3),
    Case("photos-mixup", optim=COSINE, mixup=0.3, data=photos, epochs=3),
)


def jobs() -> list[Job]:
    """All trainings: of either half's kinds SEEDS each, none of whose made pictures the other half
    sees; photos, where they are, have splits of their own."""
    found = []
    for cases in (FAULTS, SOUND, *((PHOTO_FAULTS, PHOTO_SOUND) if PHOTOS.is_dir() else ())):
        for place, case in enumerate(cases):
            half, first = ("scoring", SEEDS) if place % 2 else ("fixing", 0)
            found += [Job(case, half, n, first + n) for n in range(SEEDS)]
    return found


QUICK_FAULTS = (
    "rate-sgd",
    "tiny-rate-sgd",
    "zeros",
    "frozen-stage",
    "loud-head",
    "bytes",
    "never-trains",
    "drowned-norms",
)
QUICK_SOUND = (
    "own-recipe",
    "steady",
    "adamw",
    "mixup",
    "bf16",
    "leaky",
    "sparse",
    "imbalanced",
    "focal",
)


def quick_jobs() -> list[Job]:
    """A small fixed part of the fixing half, one seed each."""
    names = QUICK_FAULTS + QUICK_SOUND
    return [job for job in jobs() if job.case.name in names and not job.number]
