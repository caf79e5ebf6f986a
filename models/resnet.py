"""Plain-34, ResNet-34 and their relatives: one class, a table of names.

Topology of the course report and of He et al. (2015): 7x7/2 stem of 64 channels, BatchNorm, ReLU,
3x3/2 max-pool; four stages, stride 2 in the first block of stages 2-4; global average pool; a fully
connected layer. Parameter names are torchvision's.

With pre-activation (He et al. 2016) the stem's norm and activation are those of the first block,
before it forks, and the last sum is normalised (`norm`) and activated before it is pooled.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels import ACTS
from models.blocks import (
    BasicBlock,
    Block,
    Bottleneck,
    DeepStem,
    Mods,
    PlainBlock,
    PreActBlock,
    PreActBottleneck,
    conv3x3,
    norm_act,
)
from models.layers import run_layers
from models.mods import blur_pool
from models.units import linear, set_backend, stem
from profiling import nvtx

STEMS = ("imagenet", "small", "deep")
NORMS = ("batch", "group", "layer")
SHORTCUTS = ("conv", "avgpool")
INITS = ("kaiming", "xavier", "zeros", "constant")
STAGES = {"conv1": 0, "bn1": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4}
LAST_STAGE = 5
CHOICES = {"act": ACTS[1:], "norm": NORMS, "stem": STEMS, "shortcut": SHORTCUTS, "init": INITS}


class ResNet(nn.Module):
    """Images [N, 3, H, W] -> logits [N, num_classes]."""

    def __init__(
        self,
        block: type[Block],
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        num_classes: int,
        act: str,
        stem: str,
        dropout: float,
        mods: Mods,
    ):
        super().__init__()
        c_in = widths[0]
        self._make_stem(stem, c_in, act, mods)
        count = 0
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks, c_out = [], width * block.expansion
            for index in range(depth):
                count += 1
                # the further back, the likelier to be skipped (Huang et al. 2016)
                own = replace(mods, drop_path=mods.drop_path * count / sum(depths))
                blocks.append(block(c_in, c_out, 2 if number > 1 and index == 0 else 1, act, own))
                c_in = c_out
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.norm = None
        if block.preact:
            self.layer1[0].bn1 = None  # the stem's
            self.norm = norm_act(mods.norm, c_in, act)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c_in, num_classes)

    def _make_stem(self, stem: str, c_out: int, act: str, mods: Mods) -> None:
        self.maxpool = None
        if stem == "small":
            self.conv1 = conv3x3(3, c_out)
        elif stem == "deep":
            self.conv1 = DeepStem(c_out, act, mods.norm)
        else:
            self.conv1 = nn.Conv2d(3, c_out, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_act(mods.norm, c_out, act)
        if stem != "small":
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
            if mods.antialias:
                self.maxpool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), blur_pool())

    def forward(self, x: Tensor) -> Tensor:
        x = nvtx.through(self._stem, "stem", x, next(self.conv1.parameters()))
        x = run_layers((self.layer1, self.layer2, self.layer3, self.layer4), x)
        return nvtx.through(self._head, "head", x)

    def _stem(self, x: Tensor) -> Tensor:
        if self.maxpool is None:
            return self.bn1(self.conv1(x))
        return stem(self.conv1, self.bn1, self.maxpool, x)

    def _head(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        return linear(self.fc, self.dropout(self.avgpool(x).flatten(1)))


WIDTHS, MICRO = (64, 128, 256, 512), (16, 32, 48, 64)
MODELS = {
    "plain18": (PlainBlock, (2, 2, 2, 2), WIDTHS),
    "plain34": (PlainBlock, (3, 4, 6, 3), WIDTHS),
    "resnet18": (BasicBlock, (2, 2, 2, 2), WIDTHS),
    "resnet34": (BasicBlock, (3, 4, 6, 3), WIDTHS),
    "resnet50": (Bottleneck, (3, 4, 6, 3), WIDTHS),
    # seconds instead of minutes on a CPU: for tests and for trying things out
    "micro_plain": (PlainBlock, (1, 1, 1, 1), MICRO),
    "micro_resnet": (BasicBlock, (1, 1, 1, 1), MICRO),
    "micro_bottleneck": (Bottleneck, (1, 1, 1, 1), MICRO),
}
PREACT = {BasicBlock: PreActBlock, Bottleneck: PreActBottleneck}


def build_model(
    name: str,
    num_classes: int = 5,
    *,
    width: float = 1.0,
    act: str = "relu",
    norm: str = "batch",
    stem: str = "imagenet",
    se: bool = False,
    preact: bool = False,
    shortcut: str = "conv",
    antialias: bool = False,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    init: str = "kaiming",
    zero_init_residual: bool = False,
    backend: str = "eager",
) -> ResNet:
    """Build a network of `MODELS` with its modifications.

    width: all channel counts are multiplied by it and rounded to multiples of 16. act: activation
    of every block. norm: `batch`, `group` (32 groups or as many as divide the channels) or `layer`
    (one group). stem: `imagenet` (7x7/2 and max-pool), `deep` (three 3x3 and max-pool; He et al.
    2019) or `small` (3x3/1, for pictures under about 64 pixels). se: squeeze-and-excitation at the
    end of each block's branch, before the addition (Hu et al. 2018); in plain blocks before the
    last activation. preact: norm and activation before each convolution (He et al. 2016). shortcut:
    where the size changes a 1x1/2 convolution (`conv`), or `avgpool`, 2x2 means and a 1x1
    convolution (ResNet-D, He et al. 2019). antialias: blocks of stride 2, their shortcuts and the
    max-pool filter before they leave pixels out (Zhang 2019); the stem's first convolution keeps
    its stride. dropout: before the fully connected layer. drop_path: probability that a sample
    skips the last block in training, less by equal steps in those before (Huang et al. 2016).
    init: see `initialise`. zero_init_residual: the last norm of each residual block starts at 0, so
    that blocks start as identities (Goyal et al. 2017); with preact, where no norm is last, the
    last convolution. backend: eager, compile or triton.

    Raises ValueError as `check_model` does.
    """
    given = {"width": width, "dropout": dropout, "drop_path": drop_path, "preact": preact}
    given |= {"act": act, "norm": norm, "stem": stem, "shortcut": shortcut, "init": init}
    check_model(name, **given, zero_init_residual=zero_init_residual)
    block, depths, widths = MODELS[name]
    model = ResNet(
        PREACT[block] if preact else block,
        depths,
        tuple(max(16, 16 * round(channels * width / 16)) for channels in widths),
        num_classes,
        act,
        stem,
        dropout,
        Mods(norm, se, shortcut, antialias, drop_path),
    )
    initialise(model, init)
    if zero_init_residual:
        for part in (m for m in model.modules() if isinstance(m, Block)):
            conv, last = part.chain()[-1]
            nn.init.zeros_((conv if preact else last).weight)
    return set_backend(model, backend)


def check_model(name: str, **options: bool | float | str) -> None:
    """Raise ValueError, in one sentence with the cure, for a model that `build_model` does not know
    or a combination that means nothing."""
    for key, known in (("model", tuple(MODELS)), *CHOICES.items()):
        value = name if key == "model" else options.get(key, known[0])
        if value not in known:
            raise ValueError(f"unknown {key} {value!r}: choose one of {', '.join(known)}")
    for key in ("dropout", "drop_path"):
        if not 0 <= options.get(key, 0) < 1:
            raise ValueError(f"{flag_of(key)} must be in [0, 1), not {options[key]}")
    if not 0 < options.get("width", 1) < float("inf"):
        raise ValueError(f"--width must be above 0, not {options['width']}")
    if MODELS[name][0].adds:
        return
    for key in ("preact", "zero_init_residual", "drop_path", "shortcut"):
        if options.get(key) not in (None, False, 0, "conv"):
            raise ValueError(f"{flag_of(key)} needs residual blocks, {name} has none: leave it out")


def stage_of(name: str) -> int:
    """Where a parameter of that name stands: 0 is the stem, 1 to 4 the stages, LAST_STAGE the
    layers behind them."""
    return STAGES.get(name.split(".")[0], LAST_STAGE)


def flag_of(key: str) -> str:
    """The flag of an option of `build_model`."""
    return "--" + key.replace("_", "-")


@torch.no_grad()
def initialise(model: nn.Module, init: str) -> None:
    """Initialise convolution weights; BatchNorm starts at 1 and 0, the linear layer as PyTorch
    does.

    kaiming: normal, variance 2 / fan_out (He et al. 2015, as torchvision). xavier: uniform,
    variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010). zeros, constant (0.01): every filter
    of a layer alike, the linear layer too, so nothing breaks the symmetry: they show why that
    fails.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if init == "kaiming":
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif init == "xavier":
                nn.init.xavier_uniform_(module.weight)
        if isinstance(module, nn.Conv2d | nn.Linear) and init in ("zeros", "constant"):
            nn.init.constant_(module.weight, 0.0 if init == "zeros" else 0.01)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Number of parameters, and of those that are trained."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)
