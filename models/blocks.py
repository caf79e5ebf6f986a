"""The blocks of the networks: topology only, what runs them is decided in `units`.

Attribute names are torchvision's (conv1 bn1 conv2 bn2 downsample), so state_dicts are
interchangeable; bn1 .. are called so whatever the norm is.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from kernels.activation import REFERENCE
from models.mods import GroupNormAct, SqueezeExcitation, add_act, blur_pool, drop_path, groups_of
from models.units import BatchNormAct, TrunkBlock, conv_norm_act


@dataclass(frozen=True)
class Mods:
    """How the blocks of a network differ from He et al. (2015); see `resnet.build_model`.

    norm: batch, group or layer. se: squeeze-and-excitation. shortcut: conv or avgpool, where the
    size changes. antialias: filters before pixels are left out. drop_path: probability that a
    sample skips the block.
    """

    norm: str = "batch"
    se: bool = False
    shortcut: str = "conv"
    antialias: bool = False
    drop_path: float = 0.0


def norm_act(norm: str, channels: int, act: str) -> BatchNormAct | GroupNormAct:
    """The unit of a norm with an activation: batch; group (32 groups, or as many as divide the
    channels); layer (one group: all channels and pixels of an image)."""
    if norm == "batch":
        return BatchNormAct(channels, act)
    return GroupNormAct(1 if norm == "layer" else groups_of(channels), channels, act)


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution with padding 1 and no bias: a norm follows."""
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)


def conv1x1(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(c_in, c_out, 1, stride, bias=False)


class Block(TrunkBlock):
    """What the blocks share: their modifications, and how they end."""

    expansion = 1  # channels of the output for one of the 3x3 convolutions

    def __init__(self, c_out: int, stride: int, mods: Mods):
        super().__init__()
        self.drop_path = mods.drop_path
        self.se = SqueezeExcitation(c_out) if mods.se else None
        # before the last convolution, and leaves pixels out in place of the strided one
        self.blur = blur_pool() if mods.antialias and stride > 1 else None
        self.pool = None  # the same before the shortcut's convolution
        self.downsample = None

    def _add_shortcut(self, c_in: int, c_out: int, stride: int, mods: Mods) -> None:
        """Make the convolution of the shortcut where the shape changes: last, as in torchvision's
        state_dict."""
        if stride == 1 and c_in == c_out:
            return
        if stride > 1 and mods.shortcut == "avgpool":
            self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        elif stride > 1 and mods.antialias:
            self.pool = blur_pool()
        conv = conv1x1(c_in, c_out, stride if self.pool is None else 1)
        norms = () if self.preact else (norm_act(mods.norm, c_out, "identity"),)
        self.downsample = nn.Sequential(conv, *norms)

    def beyond(self) -> list[str]:
        parts = {
            "squeeze-and-excitation": self.se,
            "stochastic depth": self.drop_path,
            "anti-aliasing": self.blur,
            "a pooled shortcut": self.pool,
        }
        return [name for name, part in parts.items() if part]

    def scales(self) -> bool:
        """Whether something stands between the last norm and the addition."""
        return self.se is not None or (self.training and self.drop_path > 0)

    def scaled(self, z: Tensor) -> Tensor:
        """What the residual branch [N, C, H, W] comes to before the addition."""
        if self.se is not None:
            z = self.se(z)
        return drop_path(z, self.drop_path) if self.training and self.drop_path else z

    def opened(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """With pre-activation: what the first convolution reads, and the shortcut."""
        h = x if self.bn1 is None else self.bn1(x)
        if self.downsample is None:
            return h, x
        return h, self.downsample(h if self.pool is None else self.pool(h))

    def blurred(self, h: Tensor) -> Tensor:
        return h if self.blur is None else self.blur(h)

    def ended(self, conv: nn.Conv2d, norm: BatchNormAct | GroupNormAct, h: Tensor, x: Tensor):
        """act(scaled(norm(conv(h))) + shortcut(x)), in one pass where nothing stands between."""
        if self.pool is not None:
            x = self.pool(x)
        if not self.scales():
            return conv_norm_act(conv, norm, h, x if self.adds else None, self.downsample)
        z = self.scaled(conv_norm_act(conv, norm, h, act="identity"))
        if not self.adds:
            return REFERENCE[norm.act](z)
        shortcut = x if self.downsample is None else conv_norm_act(*self.downsample, x)
        return add_act(z, shortcut, norm.act, norm.backend)


class PlainBlock(Block):
    """act(bn2(conv2(act(bn1(conv1(x)))))): [N, c_in, H, W] -> [N, c_out, H/stride, W/stride]."""

    def __init__(self, c_in: int, c_out: int, stride: int, act: str, mods: Mods = Mods()):
        super().__init__(c_out, stride, mods)
        self.conv1 = conv3x3(c_in, c_out, stride if self.blur is None else 1)
        self.bn1 = norm_act(mods.norm, c_out, act)
        self.conv2 = conv3x3(c_out, c_out)
        self.bn2 = norm_act(mods.norm, c_out, act)
        if self.adds:
            self._add_shortcut(c_in, c_out, stride, mods)

    def chain(self) -> tuple[tuple[nn.Conv2d, BatchNormAct], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        h = conv_norm_act(self.conv1, self.bn1, x)
        return self.ended(self.conv2, self.bn2, self.blurred(h), x)


class BasicBlock(PlainBlock):
    """act(bn2(conv2(act(bn1(conv1(x))))) + shortcut(x)) (He et al. 2015, option B).

    The shortcut is the identity, or a 1x1 convolution and norm where the shape changes.
    """

    adds = True


class Bottleneck(Block):
    """act(bn3(conv3(act(bn2(conv2(act(bn1(conv1(x)))))))) + shortcut(x)): 1x1, 3x3 of a quarter of
    the channels, 1x1 (He et al. 2015). The stride is that of the 3x3, as in torchvision."""

    adds = True
    expansion = 4

    def __init__(self, c_in: int, c_out: int, stride: int, act: str, mods: Mods = Mods()):
        super().__init__(c_out, stride, mods)
        inner = c_out // self.expansion
        self.conv1 = conv1x1(c_in, inner)
        self.bn1 = norm_act(mods.norm, inner, act)
        self.conv2 = conv3x3(inner, inner, stride if self.blur is None else 1)
        self.bn2 = norm_act(mods.norm, inner, act)
        self.conv3 = conv1x1(inner, c_out)
        self.bn3 = norm_act(mods.norm, c_out, act)
        self._add_shortcut(c_in, c_out, stride, mods)

    def chain(self) -> tuple[tuple[nn.Conv2d, BatchNormAct], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)

    def forward(self, x: Tensor) -> Tensor:
        h = conv_norm_act(self.conv1, self.bn1, x)
        h = conv_norm_act(self.conv2, self.bn2, h)
        return self.ended(self.conv3, self.bn3, self.blurred(h), x)


class PreActBlock(Block):
    """conv2(act(bn2(conv1(h)))) + shortcut, h = act(bn1(x)) (He et al. 2016).

    The shortcut is x, or where the shape changes a 1x1 convolution of h; the sum stays raw. bn1 is
    None where the input has been normalised and activated before: in the first block of a network.
    """

    adds = preact = True

    def __init__(self, c_in: int, c_out: int, stride: int, act: str, mods: Mods = Mods()):
        super().__init__(c_out, stride, mods)
        self.bn1: BatchNormAct | GroupNormAct | None = norm_act(mods.norm, c_in, act)
        self.conv1 = conv3x3(c_in, c_out, stride if self.blur is None else 1)
        self.bn2 = norm_act(mods.norm, c_out, act)
        self.conv2 = conv3x3(c_out, c_out)
        self._add_shortcut(c_in, c_out, stride, mods)

    def chain(self) -> tuple[tuple[nn.Conv2d, BatchNormAct | None], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        h, shortcut = self.opened(x)
        h = conv_norm_act(self.conv1, self.bn2, h)
        return self.scaled(self.conv2(self.blurred(h))) + shortcut


class PreActBottleneck(Block):
    """conv3(act(bn3(conv2(act(bn2(conv1(h))))))) + shortcut, h = act(bn1(x)): the bottleneck with
    pre-activation (He et al. 2016)."""

    adds = preact = True
    expansion = 4

    def __init__(self, c_in: int, c_out: int, stride: int, act: str, mods: Mods = Mods()):
        super().__init__(c_out, stride, mods)
        inner = c_out // self.expansion
        self.bn1 = norm_act(mods.norm, c_in, act)
        self.conv1 = conv1x1(c_in, inner)
        self.bn2 = norm_act(mods.norm, inner, act)
        self.conv2 = conv3x3(inner, inner, stride if self.blur is None else 1)
        self.bn3 = norm_act(mods.norm, inner, act)
        self.conv3 = conv1x1(inner, c_out)
        self._add_shortcut(c_in, c_out, stride, mods)

    def chain(self) -> tuple[tuple[nn.Conv2d, BatchNormAct | None], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)

    def forward(self, x: Tensor) -> Tensor:
        h, shortcut = self.opened(x)
        h = conv_norm_act(self.conv1, self.bn2, h)
        h = conv_norm_act(self.conv2, self.bn3, h)
        return self.scaled(self.conv3(self.blurred(h))) + shortcut


class DeepStem(nn.Sequential):
    """conv(act(norm(conv(act(norm(conv(x))))))), three 3x3 convolutions, the first of stride 2, in
    place of a 7x7 (ResNet-C and -D of He et al. 2019): [N, 3, H, W] -> [N, c_out, H/2, W/2]."""

    def __init__(self, c_out: int, act: str, norm: str):
        half = c_out // 2
        super().__init__(
            conv3x3(3, half, 2),
            norm_act(norm, half, act),
            conv3x3(half, half),
            norm_act(norm, half, act),
            conv3x3(half, c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, norm1, second, norm2, last = self
        return last(conv_norm_act(second, norm2, conv_norm_act(first, norm1, x)))
