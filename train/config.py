"""The configuration: the single source of flags, help text and config.json.

The groups are nested dataclasses; on the command line their fields are flat flags. A recipe is a
whole configuration whose values explicit flags override.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from models import MODELS, check_model
from train.errors import UsageError

MADE_SPLITS = ("grouped", "random")  # by us; every other is read from a file
ModelName = Literal[
    "plain18",
    "plain34",
    "resnet18",
    "resnet34",
    "resnet50",
    "micro_plain",
    "micro_resnet",
    "micro_bottleneck",
]
assert set(ModelName.__args__) == set(MODELS)


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    model: ModelName = "resnet34"
    """Network: plain ones have no shortcuts, resnet50 has bottleneck blocks; micro ones are for
    trying things out."""
    width: float = 1.0
    """Factor on all channel counts, rounded to multiples of 16: 2 is twice as wide."""
    act: Literal["relu", "leaky_relu", "silu", "gelu", "mish"] = "relu"
    """Activation of every block."""
    norm: Literal["batch", "group", "layer"] = "batch"
    """Normalisation: over the batch, over 32 groups of channels of an image, or over the image."""
    stem: Literal["imagenet", "small", "deep"] = "imagenet"
    """First layers: 7x7/2 and max-pool; 3x3/1 for pictures under about 64 pixels; or three 3x3 and
    max-pool (ResNet-D)."""
    se: bool = False
    """Squeeze-and-excitation: a gate for every channel at the end of each block's branch."""
    preact: bool = False
    """Residual blocks with pre-activation: norm and activation before each convolution."""
    shortcut: Literal["conv", "avgpool"] = "conv"
    """Shortcut where the size changes: a 1x1/2 convolution, or 2x2 means and a 1x1 (ResNet-D)."""
    antialias: bool = False
    """Filter before pixels are left out, in strided blocks and the max-pool."""
    dropout: float = 0.0
    """Dropout before the fully connected layer."""
    drop_path: float = 0.0
    """Stochastic depth: chance that an image skips the last block in training; earlier ones have
    less."""
    init: Literal["kaiming", "xavier", "zeros", "constant"] = "kaiming"
    """Initial weights; zeros and constant show why symmetric weights do not learn."""
    zero_init_residual: bool = False
    """Start residual blocks as identities: the last norm of each begins at 0, with --preact the
    last convolution."""


@dataclass(frozen=True)
class DataConfig:
    """What it is trained on."""

    data: str = "synthetic"
    """A folder with train.csv + train/, a folder per class, food101:PATH, shards:PATTERN (tar
    files), or synthetic."""
    classes: tuple[str, ...] = ()
    """Use only these classes, in this order (default: all, sorted)."""
    relabel: Path | None = None
    """A reviewed CSV of filename,label, such as the suspects.csv of train.data.check --labels: its
    labels count instead of the data's, an empty one drops the photo."""
    limit: int | None = None
    """Use only this many images, stratified by class, for a quick trial."""
    split: str = "grouped"
    """grouped keeps all copies of a picture on one side (a column split in train.csv goes first);
    random reproduces published numbers, and leaks; a CSV of filename,label,split, such as the
    split.csv of another run, gives the very same split."""
    max_bad: float = 0.05
    """Most photos that may be missing or damaged, as a share; the others are trained on."""
    val_fraction: float = 0.2
    """Share of the images kept for validation; 0 trains on all of them."""
    fold: int | None = None
    """Validate on this one of --folds parts, from 1; every photo is in one of them."""
    folds: int | None = None
    """Parts of a cross-validation; needs --fold."""
    accept_leak: bool = False
    """A given split may have the same picture in train and validation; without this it is a
    problem."""
    image_size: int = 112
    """Height and width of the training images in pixels."""
    augment: Literal["none", "light", "strong", "heavy"] = "strong"
    """light: mild crops and flips; strong: also rotation, colour and smaller crops; heavy: more of
    it, two random operations (as RandAugment) and random erasing."""
    mixup: float = 0.0
    """Mixup: alpha of the Beta distribution from which pairs of images are blended; 0 is off."""
    cutmix: float = 0.0
    """CutMix: alpha of the Beta distribution from which the area is drawn that an image takes from
    another; 0 is off. With --mixup too, each batch has one of the two, by equal chance."""
    sampler: Literal["random", "balanced"] = "random"
    """random shows every training photo once an epoch; balanced shows every class equally often."""
    workers: int | None = None
    """Threads that prepare batches ahead (default: 1 on a CPU, up to 8 for a GPU)."""


@dataclass(frozen=True)
class OptimConfig:
    """How it is trained."""

    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 32
    """Training images a step."""
    val_batch_size: int = 64
    """Validation images a step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer."""
    lr: float | Literal["find"] = 0.03
    """Learning rate; the peak of a schedule that moves. find looks for it with a range test."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov momentum for SGD."""
    weight_decay: float = 5e-4
    """Weight decay, on convolution and linear weights only."""
    schedule: Literal["constant", "step", "cosine", "onecycle", "cyclic"] = "onecycle"
    """Learning rate over time; step divides by 10 at 60 % and 85 %, cyclic makes 4 triangles."""
    loss: Literal["ce", "weighted_ce", "focal"] = "ce"
    """Cross-entropy; weighted so that classes count alike; or focal, which turns to hard images."""
    label_smoothing: float = 0.1
    """Share of each target spread over all classes."""
    clip_grad: float = 0.0
    """Most the norm of all gradients together may be before they are scaled down; 0 is off."""
    ema: float = 0.995
    """Decay of the moving average of the weights that is evaluated and kept; 0 is off."""


@dataclass(frozen=True)
class RunConfig:
    """How and where it runs."""

    recipe: Literal["default", "report"] = "default"
    """Set of defaults; report is Table 1 of the course report."""
    fused: bool = False
    """Fused kernels where they can run: the same as --backend auto."""
    backend: Literal["eager", "auto", "compile", "triton"] | None = None
    """eager (default), auto, compile or triton; triton and compile stop when they cannot run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU when there is one."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto is bf16 where the machine has it in hardware."""
    channels_last: bool = True
    """NHWC memory layout."""
    threads: int | None = None
    """CPU threads (default: one a core)."""
    seed: int = 0
    """Seed of weights, split, order and augmentation."""
    deterministic: bool = False
    """Bit-equal runs on the same device, slower."""
    doctor: bool = True
    """Watch the training and say what goes wrong, in at most 2 % of its time."""
    steps_per_checkpoint: int = 0
    """Training steps from one checkpoint to the next; 0 saves after each epoch only."""
    out: Path | None = None
    """Run folder (default: runs/<date>-<model>-NNN)."""
    resume: Path | None = None
    """Continue the run in this folder exactly where it stopped."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


DEFAULT = Config()

# Table 1 of the course report: plain SGD, no augmentation, 224 px; whatever it does not name is
# off.
REPORT = Config(
    data=DataConfig(image_size=224, augment="none", mixup=0.0),
    optim=OptimConfig(
        epochs=8,
        batch_size=32,
        val_batch_size=64,
        optimizer="sgd",
        lr=1e-3,
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
        schedule="constant",
        label_smoothing=0.0,
        ema=0.0,
    ),
    run=RunConfig(recipe="report"),
)

RECIPES: dict[str, Config] = {"default": DEFAULT, "report": REPORT}


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dict of JSON values, as config.json holds it."""
    return _plain(dataclasses.asdict(config))


def from_dict(values: dict[str, Any]) -> Config:
    """The configuration `to_dict` wrote. Raises KeyError or TypeError for fields that do not
    exist."""
    groups = {}
    for group in dataclasses.fields(Config):
        cls = group.default_factory
        known = {f.name: f for f in dataclasses.fields(cls)}
        given = dict(values[group.name])
        for name in ("out", "resume", "relabel"):
            if name in known and given.get(name) is not None:
                given[name] = Path(given[name])
        if "classes" in given:
            given["classes"] = tuple(given["classes"])
        groups[group.name] = cls(**given)
    return Config(**groups)


def requested_backend(config: Config) -> str:
    """The backend asked for: --fused is auto, nothing is eager."""
    return "auto" if config.run.fused else config.run.backend or "eager"


def check(config: Config) -> None:
    """Raise UsageError, naming the flag and the cure, for values that cannot work."""
    if config.run.fused and config.run.backend is not None:
        raise UsageError("--fused means --backend auto: give one of the two")
    optim = config.optim
    for flag, value, least in (
        ("--epochs", optim.epochs, 1),
        ("--batch-size", optim.batch_size, 1),
        ("--val-batch-size", optim.val_batch_size, 1),
        ("--image-size", config.data.image_size, 8),
        ("--steps-per-checkpoint", config.run.steps_per_checkpoint, 0),
    ):
        if value < least:
            raise UsageError(f"{flag} must be at least {least}, not {value}")
    for flag, value, most in (
        ("--lr", 0.0 if optim.lr == "find" else optim.lr, None),
        ("--weight-decay", optim.weight_decay, None),
        ("--momentum", optim.momentum, 1),
        ("--label-smoothing", optim.label_smoothing, 1),
        ("--clip-grad", optim.clip_grad, None),
        ("--ema", optim.ema, 1),
        ("--mixup", config.data.mixup, None),
        ("--cutmix", config.data.cutmix, None),
        ("--max-bad", config.data.max_bad, 1),
    ):
        if not 0 <= value < (most or float("inf")):
            limit = f"in [0, {most})" if most else "0 or more"
            raise UsageError(f"{flag} must be {limit}, not {value}")
    _check_split(config.data)
    if optim.optimizer == "sgd" and optim.nesterov and not optim.momentum:
        raise UsageError("--nesterov needs --momentum above 0: add --momentum 0.9 or --no-nesterov")
    options = dict(vars(config.model))
    try:
        check_model(options.pop("model"), **options)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_split(data: DataConfig) -> None:
    given = data.split not in MADE_SPLITS
    if given and not Path(data.split).is_file():
        raise UsageError(
            f"--split {data.split} is no file: give grouped, random, or a CSV of "
            "filename,label,split such as a run's split.csv"
        )
    if (data.fold is None) != (data.folds is None):
        raise UsageError("--fold and --folds need each other: --fold 1 --folds 5, then --fold 2 ..")
    if data.fold is not None and not 1 <= data.fold <= data.folds >= 2:
        raise UsageError(
            f"--fold {data.fold} --folds {data.folds}: give at least 2 folds and one of 1 to that"
        )
    if given and data.fold is not None:
        raise UsageError(f"--fold has no effect beside --split {data.split}: leave one out")
    if (given or data.fold is not None) and data.val_fraction != DataConfig().val_fraction:
        raise UsageError(
            f"--val-fraction has no effect beside {'--split FILE' if given else '--fold'}: leave "
            "one out"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
