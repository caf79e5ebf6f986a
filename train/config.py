"""The configuration: the single source of flags, help text and config.json.

The groups are nested dataclasses; on the command line their fields are flat flags. A recipe is a
whole configuration whose values explicit flags override.
"""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from models import MODELS, check_model
from train.arguments import flowing
from train.errors import CheckpointError, UsageError

SMALLEST = 64  # pixels, of images that grow: under it too few details are left to learn from
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


@flowing
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


@flowing
@dataclass(frozen=True)
class DataConfig:
    """What it is trained on."""

    data: str = "synthetic"
    """A folder with train.csv + train/, a folder per class, food101:PATH, shards:PATTERN (tar
    files), or synthetic."""
    classes: tuple[str, ...] = ()
    """Use only these classes, in this order; none named is all, sorted."""
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
    image_size: int = 96
    """Height and width of the training images in pixels."""
    start_scale: float = 0.5
    """Size of the first third of the epochs, of --image-size, but no less than 64 px; the second
    third is half-way. Small images cost less, and early steps learn nothing that needs large ones
    (Tan and Le 2021)."""
    val_scale: float = 4 / 3
    """Size at which the network is validated and predicts, of --image-size. Above 1 it shows things
    as large as the crops of the training do (Touvron et al. 2019); multiples of 32 px do best."""
    val_crop: float = 0.875
    """Side of the centre at which the network is validated and predicts, of the side of a photo's
    centre square: crops of the training show things as large. 1 takes the whole square."""
    flips: bool = True
    """Validate and predict with the mean of the logits of a photo and its mirror image."""
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
    """Threads that prepare batches ahead; None is 1 on a CPU and up to 8 for a GPU."""

    @property
    def evaluated_size(self) -> int:
        """Height and width at which the network is validated and predicts, in pixels."""
        return round(self.val_scale * self.image_size)


@flowing
@dataclass(frozen=True)
class OptimConfig:
    """How it is trained."""

    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 32
    """Training images a step, on all processes together."""
    val_batch_size: int = 64
    """Validation images a step, on all processes together."""
    accumulate: int = 1
    """Parts in which a batch goes through the network one after the other, to save memory; batch
    normalisation sees one part at a time."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """Rule that changes the weights."""
    lr: float | Literal["find"] = 1e-3
    """Learning rate; the peak of a schedule that moves. find looks for it with a range test."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov momentum for SGD."""
    weight_decay: float = 0.05
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
    """Decay of the moving average of the weights that is evaluated and kept, with running
    statistics of its own; 0 is off."""
    pretrained: bool = False
    """Start from torchvision's ImageNet weights, downloaded once; the last layer starts anew."""
    init_from: Path | None = None
    """Start from the weights of this run folder, checkpoint, .safetensors or .pth file; the last
    layer starts anew where the classes differ."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each stage of the network to the one before it: 0.5 changes
    early layers, which know the most general things, least."""
    freeze_epochs: int = 0
    """First epochs in which only the last layer is trained and the others stay as they are."""
    sync_bn: bool = False
    """Under torchrun, normalise over the images of all processes instead of over each one's own;
    eager backend only."""


@flowing
@dataclass(frozen=True)
class RunConfig:
    """How and where it runs."""

    recipe: Literal["default", "best", "report"] = "default"
    """Set of defaults; best is for the highest accuracy, report is Table 1 of the course report."""
    fused: bool = False
    """Fused kernels where they can run: the same as --backend auto."""
    backend: Literal["eager", "auto", "compile", "triton"] | None = None
    """Who computes; None is eager. auto takes what can run here and pays, and says why; triton and
    compile stop when they cannot run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU when there is one."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto is bf16 where the machine has it in hardware."""
    channels_last: bool = True
    """NHWC memory layout."""
    threads: int | None = None
    """CPU threads; None is one a core."""
    seed: int = 0
    """Seed of weights, split, order and augmentation."""
    deterministic: bool = False
    """Bit-equal runs on the same device, slower."""
    doctor: bool = True
    """Watch the training and say what goes wrong, in at most 2 % of its time."""
    auto_batch: bool = False
    """The largest batch that memory allows and that leaves an epoch 8 steps, with the learning rate
    that goes with it: the root of its growth for AdamW, its growth for SGD. A --batch-size that
    does not fit goes in parts."""
    steps_per_checkpoint: int = 0
    """Training steps from one checkpoint to the next; 0 saves after each epoch only."""
    tensorboard: bool = False
    """Write the curves for TensorBoard too, into the folder tensorboard of the run."""
    out: Path | None = None
    """Run folder; None is runs/<date>-<model>-NNN."""
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
    data=DataConfig(
        image_size=224, start_scale=1.0, val_scale=1.0, val_crop=1.0, flips=False, augment="none"
    ),
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

# For the highest accuracy from scratch on a thousand photos, in half an hour on two Zen 4 cores;
# docs/recipes.md says what each ingredient brings.
BEST = Config(
    model=ModelConfig(stem="deep", se=True, shortcut="avgpool"),
    data=DataConfig(image_size=128, val_scale=1.0, mixup=0.2, cutmix=1.0),
    optim=OptimConfig(epochs=120, ema=0.998),
    run=RunConfig(recipe="best"),
)

RECIPES: dict[str, Config] = {"default": DEFAULT, "best": BEST, "report": REPORT}


def recipe_of(name: str, model: str) -> Config:
    """A recipe for a network of `MODELS`: a plain one has no shortcuts to change."""
    config = RECIPES[name]
    if MODELS[model][0].adds:
        return config
    return replace(config, model=replace(config.model, shortcut="conv"))


def epoch_sizes(config: Config) -> tuple[int, ...]:
    """Height and width of the training images in each epoch, in pixels."""
    last, epochs = config.data.image_size, config.optim.epochs
    first = max(round(config.data.start_scale * last), min(last, SMALLEST))
    stages = (first, (first + last) // 2, last)
    return tuple(stages[3 * epoch // epochs] for epoch in range(epochs))


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dict of JSON values, as config.json holds it."""
    return _plain(dataclasses.asdict(config))


def from_dict(values: Any, origin: object = "the file") -> Config:
    """The configuration `to_dict` wrote, a field that is missing at its default. Raises
    CheckpointError, naming `origin`, for fields and values that do not exist."""

    def foreign(what: str) -> CheckpointError:
        return CheckpointError(
            f"{origin} holds a configuration of another version, or a damaged one ({what}): use "
            "the version that wrote it"
        )

    groups = {}
    for group in dataclasses.fields(Config):
        cls = group.default_factory
        given = values.get(group.name) if isinstance(values, dict) else None
        if not isinstance(given, dict):
            raise foreign(f"{group.name} is missing")
        hints, fields = get_type_hints(cls), {}
        for name, value in given.items():
            if name not in hints or not _fits(value, hints[name]):
                raise foreign(f"{group.name} has {name!r}: {value!r}"[:200])
            fields[name] = _as_field(value, hints[name])
        groups[group.name] = cls(**fields)
    return Config(**groups)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is one of a field's type."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    if get_args(hint):  # a union
        return any(_fits(value, one) for one in get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is (str if hint is Path else hint)


def _as_field(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(value, str) and Path in (hint, *get_args(hint)) else value


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
        ("--accumulate", optim.accumulate, 1),
        ("--image-size", config.data.image_size, 8),
        ("--val-scale times --image-size", config.data.evaluated_size, 8),
        ("--freeze-epochs", optim.freeze_epochs, 0),
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
    if not 0 < config.data.start_scale <= 1:
        raise UsageError(
            f"--start-scale must be above 0 and at most 1, not {config.data.start_scale}"
        )
    if not 0 < config.data.val_crop <= 1:
        raise UsageError(f"--val-crop must be above 0 and at most 1, not {config.data.val_crop}")
    _check_split(config.data)
    if not 0 < optim.layer_decay <= 1:
        raise UsageError(f"--layer-decay must be above 0 and at most 1, not {optim.layer_decay}")
    if config.run.auto_batch and optim.accumulate > 1:
        raise UsageError("--auto-batch chooses --accumulate, too: leave one of the two out")
    if optim.pretrained and optim.init_from is not None:
        raise UsageError("--pretrained and --init-from are two beginnings: leave one out")
    if optim.sync_bn and config.model.norm != "batch":
        raise UsageError(
            f"--sync-bn has no effect with --norm {config.model.norm}, which knows no batch: leave "
            "it out"
        )
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
