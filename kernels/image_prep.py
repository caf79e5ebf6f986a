"""image_prep: from a device-resident set of uint8 pictures to an augmented, normalised batch.

    gather -> crop, flip, rotation (one affine map, bilinear) -> brightness, contrast, saturation
    (one affine map of RGB) -> (v / 255 - mean) / std -> cast

    source   q = L p + o         p the output pixel (x, y), q the stored one, outside reflected
    colour   v' = bc (s v + (1 - s) grey(v)) + b (1 - c) mean(grey)        cut to 0..255

Without a strength the picture is only shrunk, antialiased: every output pixel is the mean of the
stored area it covers. There is no gradient.

Traffic, S x S stored and R x R wanted: 3 S^2 bytes read, 3 R^2 elements written, one pass. The
library path (gather, grid_sample, colour, normalise, cast, channels-last) makes a dozen passes over
float32 pictures. Contrast needs the mean grey of the augmented view, which no cache can hold: it
spends a reduction, a second reading of the uint8 pixels that writes R^2 / BLOCK sums. Launches: 1
without a strength, 2 without colour (`draws` is one), 3 with.

A photo's view depends on (seed, epoch, index) alone, here as on the CPU. A CPU version that rounds
to 8 bits after the affine map and again after the colours differs by those roundings: here
everything stays float32 until the cast.

Layout: images [N, S, S, 3] uint8 contiguous, output [B, 3, R, R] channels-last. Where Triton cannot
run the op is `reference`.
"""

import torch

from kernels import draws
from kernels.draws import MAX_DEGREES, Strength, draw
from kernels.launch import (
    cdiv,
    check,
    empty_nhwc,
    next_power_of_2,
    nhwc,
    run,
    runs_triton,
    tl,
    triton,
)
from kernels.numerics import rounded
from kernels.spec import Cost, Inputs, KernelSpec, Shape

BLOCK = 1024  # output pixels a program

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


def reference(
    images: torch.Tensor,
    indices: torch.Tensor,
    epoch: torch.Tensor,
    seed: int,
    size: int,
    strength: Strength | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.bfloat16,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain PyTorch; computes in float64 for float64, else in float32."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    pictures = images[indices if rows is None else rows].to(work)
    store = images.shape[1]
    if strength is None:
        edges = torch.arange(store, device=images.device, dtype=work)
        low = torch.arange(size, device=images.device, dtype=work)[:, None] * (store / size)
        covered = torch.minimum(low + store / size, edges + 1) - torch.maximum(low, edges)
        shrink = covered.clamp(min=0) * (size / store)
        view = torch.einsum("yi,xj,bijc->byxc", shrink, shrink, pictures)
    else:
        parameters = draws.reference(indices, epoch, seed, strength, store, size).to(work)
        view = _reference_view(pictures, parameters[:, :6].view(-1, 2, 3), size)
        if strength[3]:
            brightness, contrast, saturation = parameters[:, 6:, None, None, None].unbind(1)
            grey = (view * view.new_tensor(GREY)).sum(dim=3, keepdim=True)
            middle = grey.mean(dim=(1, 2), keepdim=True)
            view = saturation * view + (1 - saturation) * grey
            view = brightness * (contrast * view + (1 - contrast) * middle)
            view = view.clamp(0, 255)
    view = (view / 255 - view.new_tensor(mean)) / view.new_tensor(std)
    return view.permute(0, 3, 1, 2).to(dtype)


def _reference_view(pictures: torch.Tensor, affine: torch.Tensor, size: int) -> torch.Tensor:
    batch, store = pictures.shape[:2]
    y, x = torch.meshgrid(*2 * [torch.arange(size, device=pictures.device)], indexing="ij")
    grid = torch.stack([x, y, torch.ones_like(x)]).to(affine).view(3, -1)
    position = affine @ grid  # [B, 2, size * size]
    corner = position.floor()
    fraction = (position - corner)[..., None]
    view = torch.zeros((), dtype=pictures.dtype, device=pictures.device)
    for right in (0, 1):
        for below in (0, 1):
            at = corner.long() + torch.tensor([[right], [below]], device=pictures.device)
            at = store - 1 - (store - 1 - at.abs()).abs()  # mirrored, the edge not repeated
            at = at.clamp(0, store - 1)
            taps = pictures[torch.arange(batch, device=at.device)[:, None], at[:, 1], at[:, 0]]
            weight_x = fraction[:, 0] if right else 1 - fraction[:, 0]
            weight_y = fraction[:, 1] if below else 1 - fraction[:, 1]
            view = view + weight_x * weight_y * taps
    return view.view(batch, size, size, 3)


@triton.jit
def _mirrored(i, STORE: tl.constexpr):
    """Positions -STORE < i < 2 STORE - 1 brought back inside, the edge pixel not repeated."""
    i = STORE - 1 - tl.abs(STORE - 1 - tl.abs(i))
    return tl.minimum(tl.maximum(i, 0), STORE - 1)


@triton.jit
def _tap(picture_ptr, x, y, weight, inside, r, g, b, STORE: tl.constexpr):
    """r, g, b plus `weight` times the stored pixel (x, y)."""
    at = picture_ptr + (y * STORE + x) * 3
    r += weight * tl.load(at, mask=inside, other=0).to(tl.float32)
    g += weight * tl.load(at + 1, mask=inside, other=0).to(tl.float32)
    b += weight * tl.load(at + 2, mask=inside, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def _warped(
    picture_ptr, parameters_ptr, stride, p, inside,
    STORE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bilinear samples at L (x, y) + o for the output pixels p: three float32 [BLOCK] in 0..255."""
    x = (p % SIZE).to(tl.float32)
    y = (p // SIZE).to(tl.float32)
    at_x = tl.load(parameters_ptr) * x + tl.load(parameters_ptr + stride) * y
    at_x += tl.load(parameters_ptr + 2 * stride)
    at_y = tl.load(parameters_ptr + 3 * stride) * x + tl.load(parameters_ptr + 4 * stride) * y
    at_y += tl.load(parameters_ptr + 5 * stride)
    left = tl.floor(at_x)
    top = tl.floor(at_y)
    fx = at_x - left
    fy = at_y - top
    x0 = _mirrored(left.to(tl.int32), STORE)
    x1 = _mirrored(left.to(tl.int32) + 1, STORE)
    y0 = _mirrored(top.to(tl.int32), STORE)
    y1 = _mirrored(top.to(tl.int32) + 1, STORE)
    r = tl.zeros((BLOCK,), tl.float32)
    g = tl.zeros((BLOCK,), tl.float32)
    b = tl.zeros((BLOCK,), tl.float32)
    r, g, b = _tap(picture_ptr, x0, y0, (1 - fx) * (1 - fy), inside, r, g, b, STORE)
    r, g, b = _tap(picture_ptr, x1, y0, fx * (1 - fy), inside, r, g, b, STORE)
    r, g, b = _tap(picture_ptr, x0, y1, (1 - fx) * fy, inside, r, g, b, STORE)
    r, g, b = _tap(picture_ptr, x1, y1, fx * fy, inside, r, g, b, STORE)
    return r, g, b


@triton.jit
def _shrunk(picture_ptr, p, inside, STORE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Mean of the stored area under the output pixels p: three float32 [BLOCK] in 0..255."""
    TAPS: tl.constexpr = STORE // SIZE if STORE % SIZE == 0 else STORE // SIZE + 2
    x, y = p % SIZE, p // SIZE
    r = tl.zeros((BLOCK,), tl.float32)
    g = tl.zeros((BLOCK,), tl.float32)
    b = tl.zeros((BLOCK,), tl.float32)
    # in units of 1 / SIZE stored pixels everything is an exact integer
    for j in range(TAPS):
        sy, part_y = _covered(y, j, STORE, SIZE)
        for i in range(TAPS):
            sx, part_x = _covered(x, i, STORE, SIZE)
            some = inside & (part_x > 0) & (part_y > 0)
            weight = part_x.to(tl.float32) * part_y.to(tl.float32)
            r, g, b = _tap(picture_ptr, sx, sy, weight, some, r, g, b, STORE)
    return r / (STORE * STORE), g / (STORE * STORE), b / (STORE * STORE)


@triton.jit
def _covered(i, tap, STORE: tl.constexpr, SIZE: tl.constexpr):
    """The stored pixel number `tap` under output pixel i, and how much of it lies there."""
    stored = i * STORE // SIZE + tap
    high = tl.minimum((i + 1) * STORE, (stored + 1) * SIZE)
    return stored, tl.maximum(high - tl.maximum(i * STORE, stored * SIZE), 0)


@triton.jit
def _place(
    images_ptr, rows_ptr, count, STORE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """This program's place n in the batch and its output pixels p, the stored picture, whether
    there is one, and the pixels that it fills."""
    TILES: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    n = tl.program_id(0) // TILES
    p = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + n)
    known = (row >= 0) & (row < count)
    return n, p, images_ptr + row * (STORE * STORE * 3), known, known & (p < SIZE * SIZE)


@triton.jit
def _grey(r, g, b):
    return r * 0.299 + g * 0.587 + b * 0.114


@triton.jit
def _mean_kernel(
    images_ptr, rows_ptr, parameters_ptr, sums_ptr, count, batch,
    STORE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * TILES,); sums [B, TILES] of the view's grey."""
    n, p, picture_ptr, _, inside = _place(images_ptr, rows_ptr, count, STORE, SIZE, BLOCK)
    r, g, b = _warped(picture_ptr, parameters_ptr + n, batch, p, inside, STORE, SIZE, BLOCK)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(_grey(r, g, b)))


@triton.jit
def _prep_kernel(
    images_ptr, rows_ptr, parameters_ptr, sums_ptr, y_ptr, count, batch,
    mean_r, mean_g, mean_b, std_r, std_g, std_b,
    STORE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (B * TILES,). Without parameters the picture is shrunk, without sums it keeps its
    colours. A row that is no picture becomes NaN: nothing can be raised from here."""
    n, p, picture_ptr, known, inside = _place(images_ptr, rows_ptr, count, STORE, SIZE, BLOCK)
    if parameters_ptr is None:
        r, g, b = _shrunk(picture_ptr, p, inside, STORE, SIZE, BLOCK)
    else:
        r, g, b = _warped(picture_ptr, parameters_ptr + n, batch, p, inside, STORE, SIZE, BLOCK)
    if sums_ptr is not None:
        TILES: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
        tile = tl.arange(0, BLOCK_T)
        sums = tl.load(sums_ptr + n * TILES + tile, mask=tile < TILES, other=0.0)
        middle = tl.sum(sums) / (SIZE * SIZE)
        brightness = tl.load(parameters_ptr + 6 * batch + n)
        contrast = tl.load(parameters_ptr + 7 * batch + n)
        saturation = tl.load(parameters_ptr + 8 * batch + n)
        own = brightness * contrast * saturation
        grey = brightness * contrast * (1.0 - saturation) * _grey(r, g, b)
        shared = grey + brightness * (1.0 - contrast) * middle
        r = tl.minimum(tl.maximum(own * r + shared, 0.0), 255.0)
        g = tl.minimum(tl.maximum(own * g + shared, 0.0), 255.0)
        b = tl.minimum(tl.maximum(own * b + shared, 0.0), 255.0)
    r = tl.where(known, (r / 255.0 - mean_r) / std_r, float("nan"))
    g = tl.where(known, (g / 255.0 - mean_g) / std_g, float("nan"))
    b = tl.where(known, (b / 255.0 - mean_b) / std_b, float("nan"))
    at = y_ptr + n.to(tl.int64) * (SIZE * SIZE * 3) + p * 3
    tl.store(at, rounded(r, y_ptr.dtype.element_ty), mask=p < SIZE * SIZE)
    tl.store(at + 1, rounded(g, y_ptr.dtype.element_ty), mask=p < SIZE * SIZE)
    tl.store(at + 2, rounded(b, y_ptr.dtype.element_ty), mask=p < SIZE * SIZE)


def forward(
    images: torch.Tensor,
    indices: torch.Tensor,
    epoch: torch.Tensor,
    seed: int,
    size: int,
    strength: Strength | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    """Launch the whole preparation; returns [B, 3, size, size], channels-last."""
    batch, (count, store) = len(indices), images.shape[:2]
    rows = indices if rows is None else rows
    y = empty_nhwc(batch, 3, size, size, like=images, dtype=dtype)
    if not y.numel():
        return y
    tiles = cdiv(size * size, BLOCK)
    shape = {"STORE": store, "SIZE": size, "BLOCK": BLOCK}
    parameters = sums = None
    if strength is not None:
        parameters = draw(indices, epoch, seed, strength, store, size)
        if strength[3]:
            sums = parameters.new_empty(batch, tiles)
            args = (images, rows, parameters, sums, count, batch)
            run(_mean_kernel, (batch * tiles,), *args, **shape)
    args = (images, rows, parameters, sums, y, count, batch, *mean, *std)
    run(_prep_kernel, (batch * tiles,), *args, BLOCK_T=next_power_of_2(tiles), **shape)
    return y


@torch.library.custom_op("lapis::image_prep", mutates_args=())
def _op(
    images: torch.Tensor,
    indices: torch.Tensor,
    epoch: torch.Tensor,
    seed: int,
    size: int,
    strength: list[float] | None,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    args = (images, indices, epoch, seed, size, strength, mean, std, dtype, rows)
    return forward(*args) if runs_triton(images) else nhwc(reference(*args))


@_op.register_fake
def _(images, indices, epoch, seed, size, strength, mean, std, dtype, rows):
    return empty_nhwc(len(indices), 3, size, size, like=images, dtype=dtype)


def image_prep(
    images: torch.Tensor,
    indices: torch.Tensor,
    epoch: int | torch.Tensor,
    *,
    seed: int,
    size: int,
    strength: Strength | None,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.bfloat16,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """One epoch's view of each photo, normalised: [B, 3, size, size] of `dtype`, channels-last.

    images: uint8 [N, S, S, 3], contiguous, S >= size. indices: int64 [B], the photos' numbers,
    which with `epoch` and `seed` decide everything random. rows: int64 [B], where in `images` they
    are, if not at their numbers. epoch: an int64 tensor [] on the device lets a captured CUDA
    graph move on. strength: (least share of the square a crop keeps, most width / height of a
    crop, degrees of rotation either way, colour factors' distance from 1), None for the picture
    itself. mean, std: of RGB in 0..1.
    A row outside 0..N-1 gives a picture of NaN on a GPU and raises on a CPU. Raises ValueError for
    wrong shapes, types, devices or strengths.
    """
    check(
        images.dim() == 4 and images.shape[1:] == (images.shape[1], images.shape[1], 3),
        lambda: f"images must be [N, S, S, 3], not {tuple(images.shape)}",
    )
    check(
        images.dtype == torch.uint8 and images.is_contiguous(),
        lambda: f"images must be contiguous uint8, not {images.dtype} of strides {images.stride()}",
    )
    check(
        1 <= size <= images.shape[1],
        lambda: f"size must lie in 1..{images.shape[1]}, the stored pictures' size, not {size}",
    )
    check(dtype.is_floating_point, lambda: f"dtype must be a float type, not {dtype}")
    _check_numbers("indices", indices, images, indices.shape[:1])
    if rows is not None:
        _check_numbers("rows", rows, images, indices.shape)
        rows = rows.contiguous()
    if strength is not None:
        _check_strength(*strength)
    if not isinstance(epoch, torch.Tensor):
        epoch = torch.full((), epoch, dtype=torch.int64, device=images.device)
    _check_numbers("epoch", epoch, images, ())
    args = (None if strength is None else list(strength), list(mean), list(std), dtype, rows)
    return _op(images, indices.contiguous(), epoch, seed, size, *args)


def _check_numbers(name: str, value: torch.Tensor, images: torch.Tensor, shape) -> None:
    check(
        value.dtype == torch.int64 and value.shape == shape and value.device == images.device,
        lambda: (
            f"{name} must be int64 {list(shape)} on {images.device}, not {value.dtype} "
            f"{list(value.shape)} on {value.device}"
        ),
    )


def _check_strength(area: float, ratio: float, degrees: float, colour: float) -> None:
    check(
        0 < area <= 1 and ratio >= 1 and 0 <= degrees <= MAX_DEGREES and 0 <= colour <= 1,
        lambda: (
            "strength needs 0 < area <= 1, ratio >= 1, degrees in "
            f"0..{MAX_DEGREES:g}, colour in 0..1, not {(area, ratio, degrees, colour)}"
        ),
    )


def _make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    batch, store, size = shape
    images = torch.randint(
        256, (batch + 3, store, store, 3), generator=generator, device=generator.device
    )
    indices = torch.randint(batch + 3, (batch,), generator=generator, device=generator.device)
    return {
        "images": images.to(device, torch.uint8),
        "indices": indices.to(device),
        "epoch": torch.full((), 3, dtype=torch.int64, device=device),
        "seed": 12345678901,
        "size": size,
        "strength": (0.35, 4 / 3, 15.0, 0.3),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "dtype": dtype,
    }


def _launch(images: torch.Tensor, strength: Strength, **others) -> None:
    for kind in (None, (*strength[:3], 0.0), strength):
        forward(images=images, strength=kind, rows=None, **others)


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    batch, store, size = shape
    pixels = 3.0 * batch * size * size
    bytes_moved = 3.0 * batch * store * store + pixels * itemsize
    return {"forward": Cost(24.0 * pixels, bytes_moved), "backward": Cost(0.0, 0.0)}


# (batch, stored size, size)
SHAPES = ((32, 256, 224), (32, 224, 224), (32, 176, 128))
SPEC = KernelSpec("image_prep", reference, image_prep, _make_inputs, _launch, _cost, SHAPES)
