"""draws: the random numbers of `image_prep`, and what they decide about each picture.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
with key = seed and counter = (draw, index, epoch, 0): four numbers for each draw, which depend on
nothing else. CROP: area, ratio, centre x, centre y. TURN: flip, angle. COLOUR: brightness,
contrast, saturation.

The parameters of a picture are an affine map from output to stored pixels, q = L p + o with
p = (x, y), and three colour factors: L00 L01 o0 L10 L11 o1 brightness contrast saturation.
"""

import math

import torch

from kernels.launch import cdiv, run, tl, triton

CROP, TURN, COLOUR = (tl.constexpr(draw) for draw in range(3))
PARAMETERS = 9
BLOCK_B = 128
MAX_DEGREES = 45.0  # the polynomials of sine and cosine, and one reflection, reach that far

Strength = tuple[float, float, float, float]  # area, ratio, degrees, colour: see `image_prep`


def reference(
    indices: torch.Tensor,
    epoch: torch.Tensor,
    seed: int,
    strength: Strength,
    store: int,
    size: int,
) -> torch.Tensor:
    """The parameters in plain PyTorch: float64 [B, 9]."""
    area, ratio, degrees, colour = strength
    draws = [_uniform(seed, draw, indices, epoch).double() for draw in range(3)]
    (u_area, u_ratio, u_x, u_y), (u_flip, u_turn, _, _) = draws[:2]
    side = (area + (1 - area) * u_area).sqrt()
    root = ratio ** (u_ratio - 0.5)
    width, height = (side * root).clamp(max=1), (side / root).clamp(max=1)
    angle = math.radians(degrees) * (2 * u_turn - 1)
    across = torch.where(u_flip < 0.5, -width, width) * (store / size)
    down = height * (store / size)
    # the centre of pixel i is i + 1/2 on both sides of the map
    half = size / 2 - 0.5
    l00, l01 = across * angle.cos(), -down * angle.sin()
    l10, l11 = across * angle.sin(), down * angle.cos()
    o0 = store * (0.5 + (1 - width) * (u_x - 0.5)) - (l00 + l01) * half - 0.5
    o1 = store * (0.5 + (1 - height) * (u_y - 0.5)) - (l10 + l11) * half - 0.5
    factors = 1 + colour * (2 * draws[2][:3] - 1)
    return torch.stack([l00, l01, o0, l10, l11, o1, *factors], dim=1)


def _uniform(seed: int, draw: int, indices: torch.Tensor, epoch: torch.Tensor) -> torch.Tensor:
    """Triton's `rand4x` in int64 arithmetic: float32 [4, B] in 0..1."""
    low = 0xFFFFFFFF
    c1 = indices & low
    c0, c2, c3 = c1 * 0 + draw, c1 * 0 + (epoch & low), c1 * 0
    k0, k1 = seed & low, seed >> 32 & low

    def high(a: torch.Tensor, b: int) -> torch.Tensor:  # upper half of a 64-bit product
        return (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16

    for _ in range(10):
        a, b = 0xD2511F53, 0xCD9E8D57
        c0, c1, c2, c3 = (
            high(c2, b) ^ c1 ^ k0,
            c2 * b & low,
            high(c0, a) ^ c3 ^ k1,
            c0 * a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack([c0, c1, c2, c3])
    return torch.where(words >> 31 == 1, low - words, words).float() * 4.6566127342e-10


@triton.jit
def uniforms(seed, draw, index, epoch):
    """Four float32 blocks in 0..1 for a uint32 block of photo numbers."""
    zero = index * 0
    a, b, c, d = tl.philox(seed, zero + draw, index, zero + epoch, zero)
    return (
        tl.uint_to_uniform_float(a),
        tl.uint_to_uniform_float(b),
        tl.uint_to_uniform_float(c),
        tl.uint_to_uniform_float(d),
    )


@triton.jit
def _draw_kernel(
    indices_ptr,
    epoch_ptr,
    parameters_ptr,
    seed,
    area,
    log2_ratio,
    radians,
    colour,
    scale,
    store,
    half,
    batch,
    BLOCK_B: tl.constexpr,
):  # grid (B / BLOCK_B,); parameters [9, B]
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = b < batch
    index = tl.load(indices_ptr + b, mask=inside, other=0).to(tl.uint32)
    epoch = tl.load(epoch_ptr).to(tl.uint32)
    u_area, u_ratio, u_x, u_y = uniforms(seed, CROP, index, epoch)
    u_flip, u_turn, _, _ = uniforms(seed, TURN, index, epoch)
    u_brightness, u_contrast, u_saturation, _ = uniforms(seed, COLOUR, index, epoch)

    side = tl.sqrt(area + (1.0 - area) * u_area)
    root = tl.exp2(log2_ratio * (u_ratio - 0.5))
    width = tl.minimum(side * root, 1.0)
    height = tl.minimum(side / root, 1.0)
    angle = radians * (2.0 * u_turn - 1.0)
    # Taylor: 2e-9 at 45 degrees. The library's sine spills to memory for arguments of any size
    q = angle * angle
    sine = angle * (1 - q / 6 * (1 - q / 20 * (1 - q / 42 * (1 - q / 72))))
    cosine = 1 - q / 2 * (1 - q / 12 * (1 - q / 30 * (1 - q / 56 * (1 - q / 90))))
    across = tl.where(u_flip < 0.5, -width, width) * scale
    down = height * scale
    l00 = across * cosine
    l01 = -down * sine
    l10 = across * sine
    l11 = down * cosine
    o0 = store * (0.5 + (1.0 - width) * (u_x - 0.5)) - (l00 + l01) * half - 0.5
    o1 = store * (0.5 + (1.0 - height) * (u_y - 0.5)) - (l10 + l11) * half - 0.5

    at = parameters_ptr + b
    tl.store(at, l00, mask=inside)
    tl.store(at + batch, l01, mask=inside)
    tl.store(at + 2 * batch, o0, mask=inside)
    tl.store(at + 3 * batch, l10, mask=inside)
    tl.store(at + 4 * batch, l11, mask=inside)
    tl.store(at + 5 * batch, o1, mask=inside)
    tl.store(at + 6 * batch, 1.0 + colour * (2.0 * u_brightness - 1.0), mask=inside)
    tl.store(at + 7 * batch, 1.0 + colour * (2.0 * u_contrast - 1.0), mask=inside)
    tl.store(at + 8 * batch, 1.0 + colour * (2.0 * u_saturation - 1.0), mask=inside)


def draw(
    indices: torch.Tensor, epoch: torch.Tensor, seed: int, strength: Strength, store: int, size: int
) -> torch.Tensor:
    """Launch the drawing of the parameters, those of `reference`: float32 [9, B]."""
    area, ratio, degrees, colour = strength
    batch = len(indices)
    parameters = indices.new_empty(PARAMETERS, batch, dtype=torch.float32)
    factors = (area, math.log2(ratio), math.radians(degrees), colour, store / size)
    args = (indices, epoch, parameters, seed, *factors, store, size / 2 - 0.5, batch)
    run(_draw_kernel, (cdiv(batch, BLOCK_B),), *args, BLOCK_B=BLOCK_B)
    return parameters
