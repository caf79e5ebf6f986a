"""The blocks of the networks: topology only, what runs them is decided in `units`.

Attribute names are torchvision's (conv1 bn1 conv2 bn2 downsample), so state_dicts are
interchangeable.
"""

from torch import Tensor, nn

from models.units import BatchNormAct, TrunkBlock, conv_norm_act


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution with padding 1 and no bias: a BatchNorm follows."""
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)


class PlainBlock(TrunkBlock):
    """relu(bn2(conv2(relu(bn1(conv1(x)))))): [N, c_in, H, W] -> [N, c_out, H/stride, W/stride]."""

    def __init__(self, c_in: int, c_out: int, stride: int, act: str):
        super().__init__()
        self.conv1 = conv3x3(c_in, c_out, stride)
        self.bn1 = BatchNormAct(c_out, act)
        self.conv2 = conv3x3(c_out, c_out)
        self.bn2 = BatchNormAct(c_out, act)
        self.downsample = None

    def chain(self) -> tuple[tuple[nn.Conv2d, BatchNormAct], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        h = conv_norm_act(self.conv1, self.bn1, x)
        return conv_norm_act(self.conv2, self.bn2, h)


class BasicBlock(PlainBlock):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)) (He et al. 2015, option B).

    The shortcut is the identity, or a 1x1 convolution and BatchNorm where the shape changes.
    """

    adds = True
    chain = PlainBlock.chain

    def __init__(self, c_in: int, c_out: int, stride: int, act: str):
        super().__init__(c_in, c_out, stride, act)
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), BatchNormAct(c_out, "identity")
            )

    def forward(self, x: Tensor) -> Tensor:
        h = conv_norm_act(self.conv1, self.bn1, x)
        return conv_norm_act(self.conv2, self.bn2, h, x, self.downsample)


class PreActBlock(TrunkBlock):
    """conv2(act(bn2(conv1(h)))) + shortcut, h = act(bn1(x)) (He et al. 2016).

    The shortcut is x, or where the shape changes a 1x1 convolution of h; the sum stays raw. bn1 is
    None where the input has been normalised and activated before: in the first block of a network.
    """

    adds = preact = True

    def __init__(self, c_in: int, c_out: int, stride: int, act: str):
        super().__init__()
        self.bn1: BatchNormAct | None = BatchNormAct(c_in, act)
        self.conv1 = conv3x3(c_in, c_out, stride)
        self.bn2 = BatchNormAct(c_out, act)
        self.conv2 = conv3x3(c_out, c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False))

    def chain(self) -> tuple[tuple[nn.Conv2d, BatchNormAct | None], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.bn1 is None else self.bn1(x)
        shortcut = x if self.downsample is None else self.downsample(h)
        return self.conv2(conv_norm_act(self.conv1, self.bn2, h)) + shortcut
