"""Plain-34, ResNet-34 and their smaller relatives: one class, a table of names.

Topology of the course report and of He et al. (2015): 7x7/2 stem of 64 channels, BatchNorm, ReLU,
3x3/2 max-pool; four stages, stride 2 in the first block of stages 2-4; global average pool; a fully
connected layer. Parameter names are torchvision's.

With pre-activation (He et al. 2016) the stem's norm and activation are those of the first block,
before it forks, and the last sum is normalised (`norm`) and activated before it is pooled.
"""

from functools import partial

import torch
from torch import Tensor, nn

from models.blocks import BasicBlock, PlainBlock, PreActBlock
from models.layers import run_layers
from models.units import BatchNormAct, TrunkBlock, linear, set_backend, stem
from profiling import nvtx

STEMS = ("imagenet", "small")
INITS = ("kaiming", "xavier", "zeros", "constant")


class ResNet(nn.Module):
    """Images [N, 3, H, W] -> logits [N, num_classes]."""

    def __init__(
        self,
        block: type[TrunkBlock],
        depths: tuple[int, ...],
        widths: tuple[int, ...] = (64, 128, 256, 512),
        num_classes: int = 5,
        act: str = "relu",
        stem: str = "imagenet",
        dropout: float = 0.0,
    ):
        super().__init__()
        if stem == "small":
            self.conv1 = nn.Conv2d(3, widths[0], 3, stride=1, padding=1, bias=False)
            self.maxpool = None
        else:
            self.conv1 = nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = BatchNormAct(widths[0], act)
        c_in = widths[0]
        for number, (depth, c_out) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks = []
            for index in range(depth):
                blocks.append(block(c_in, c_out, 2 if number > 1 and index == 0 else 1, act))
                c_in = c_out
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.norm = None
        if block.preact:
            self.layer1[0].bn1 = None  # the stem's
            self.norm = BatchNormAct(c_in, act)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nvtx.through(self._stem, "stem", x, self.conv1.weight)
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


MODELS = {
    "plain18": partial(ResNet, PlainBlock, (2, 2, 2, 2)),
    "plain34": partial(ResNet, PlainBlock, (3, 4, 6, 3)),
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    # seconds instead of minutes on a CPU: for tests and for trying things out
    "micro_plain": partial(ResNet, PlainBlock, (1, 1, 1, 1), (16, 32, 48, 64)),
    "micro_resnet": partial(ResNet, BasicBlock, (1, 1, 1, 1), (16, 32, 48, 64)),
}


def build_model(
    name: str,
    num_classes: int = 5,
    *,
    act: str = "relu",
    stem: str = "imagenet",
    dropout: float = 0.0,
    init: str = "kaiming",
    preact: bool = False,
    zero_init_residual: bool = False,
    backend: str = "eager",
) -> ResNet:
    """Build a network of `MODELS` with its modifications.

    act: activation of every block. stem: `imagenet` (7x7/2 and max-pool) or `small` (3x3/1, for
    pictures under about 64 pixels). dropout: before the fully connected layer. init: see
    `initialise`. preact: norm and activation before each convolution (He et al. 2016).
    zero_init_residual: the last BatchNorm of each residual block starts at 0, so that blocks start
    as identities (Goyal et al. 2017); with preact, where no norm is last, the last convolution.
    backend: eager, compile or triton.

    Raises ValueError for an unknown name or a combination that means nothing.
    """
    for value, known, what in (
        (name, tuple(MODELS), "model"),
        (stem, STEMS, "stem"),
        (init, INITS, "init"),
    ):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(known)}")
    make, block = MODELS[name], MODELS[name].args[0]
    for flag, asked in (("--preact", preact), ("--zero-init-residual", zero_init_residual)):
        if asked and not block.adds:
            raise ValueError(f"{name} has no residual blocks: leave out {flag}")
    if preact:
        make = partial(make.func, PreActBlock, *make.args[1:])
    model = make(num_classes=num_classes, act=act, stem=stem, dropout=dropout)
    initialise(model, init)
    if zero_init_residual:
        for block in (m for m in model.modules() if isinstance(m, TrunkBlock)):
            nn.init.zeros_((block.conv2 if preact else block.bn2).weight)
    return set_backend(model, backend)


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
