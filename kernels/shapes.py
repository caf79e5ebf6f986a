"""The ResNet-34 layer table: every convolution site, and shapes at the edges that tests go
through."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvSite:
    """A convolution of the network: input [N, C, H, W], K filters of R x R; `count` of them in the
    network."""

    name: str
    count: int
    c: int
    h: int
    w: int
    k: int
    r: int
    stride: int
    padding: int

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        return conv_out(self.h, self.r, self.stride, self.padding), conv_out(
            self.w, self.r, self.stride, self.padding
        )

    def flops(self, batch: int) -> float:
        """Multiplications and additions of one forward pass."""
        p, q = self.out
        return 2.0 * batch * p * q * self.k * self.c * self.r * self.r


def conv_out(size: int, kernel: int, stride: int, padding: int) -> int:
    """Output length of a convolution or pooling window along one axis (floor division, as
    PyTorch)."""
    return (size + 2 * padding - kernel) // stride + 1


RESNET34: tuple[ConvSite, ...] = (
    ConvSite("stem", 1, 3, 224, 224, 64, 7, 2, 3),
    ConvSite("layer1.3x3", 6, 64, 56, 56, 64, 3, 1, 1),
    ConvSite("layer2.0.conv1", 1, 64, 56, 56, 128, 3, 2, 1),
    ConvSite("layer2.0.downsample", 1, 64, 56, 56, 128, 1, 2, 0),
    ConvSite("layer2.3x3", 7, 128, 28, 28, 128, 3, 1, 1),
    ConvSite("layer3.0.conv1", 1, 128, 28, 28, 256, 3, 2, 1),
    ConvSite("layer3.0.downsample", 1, 128, 28, 28, 256, 1, 2, 0),
    ConvSite("layer3.3x3", 11, 256, 14, 14, 256, 3, 1, 1),
    ConvSite("layer4.0.conv1", 1, 256, 14, 14, 512, 3, 2, 1),
    ConvSite("layer4.0.downsample", 1, 256, 14, 14, 512, 1, 2, 0),
    ConvSite("layer4.3x3", 5, 512, 7, 7, 512, 3, 1, 1),
)

# [N, C, H, W] after each stage at batch 32: what the pointwise rooms see.
STAGES: tuple[tuple[int, int, int, int], ...] = (
    (32, 64, 56, 56),
    (32, 128, 28, 28),
    (32, 256, 14, 14),
    (32, 512, 7, 7),
)
STEM: tuple[int, int, int, int] = (32, 64, 112, 112)

# Odd heights and widths, channels that fill no tile, one image, one pixel.
EDGES: tuple[tuple[int, int, int, int], ...] = (
    (1, 1, 1, 1),
    (1, 8, 5, 7),
    (2, 24, 9, 5),
    (3, 72, 7, 7),
    (5, 136, 3, 1),
)
