"""bn_stats: the batch mean and biased variance of every channel, without cancellation.

    within a program   d = x - mean;  mean += d/k;  M2 += d*(x - mean)           (Welford 1962)
    between groups     n = sum n_i;   mean = sum n_i*mean_i / n                  (Chan, Golub,
                       M2 = sum(M2_i + n_i*(mean_i - mean)^2);  var = M2 / n      LeVeque 1979)

The variance is good to 1e-6 at mean/std = 100, where plain sums of x^2 lose 1e-3. Two launches:
programs leave partial means and M2, the merge adds them in a fixed order. Traffic: x is read once.

`merge` also finishes what a convolution leaves in its epilogue. Partials are float32 [2, P, C],
mean then M2, of the [M, C] view of a channels-last tensor, M = N*H*W, cut into tiles of `rows`
rows; partial p covers the tiles p, p + P, p + 2P ... so that with P = ceil(M / rows) each tile is
a partial. Counts follow from (M, rows, P) and are not stored. Thousands of tiles are first folded
to FOLDED partials that keep this order. A GPU's float32 `/` may be off by two units in the last
place: where a mean comes out of it, the division is the rounded one, so that a constant channel
keeps its value and a variance of zero.

`track` moves the three running buffers of a BatchNorm in one launch:

    running = (1 - factor)*running + factor*batch, the batch's variance being var*M/(M - 1)

Where Triton cannot run, `batch_statistics` is `torch.var_mean` and `track` the formula.
"""

from typing import NamedTuple

import torch

from kernels.launch import (
    cdiv,
    check,
    multiprocessors,
    next_power_of_2,
    nhwc,
    run,
    runs_triton,
    tl,
    triton,
)

MERGE_PARTIALS, MERGE_CHANNELS = 512, 8  # 8 float32 fill a 32-byte sector
FOLD_ABOVE, FOLDED = 2048, 128  # partials, one a tile, that one program a sector takes too long for
FOLD_PARTIALS, FOLD_CHANNELS = 128, 32
TRACK_CHANNELS = 1024


class Tile(NamedTuple):
    """Elements of a [BLOCK_M, BLOCK_C] tile, warps that share it, and for reductions how many
    programs each multiprocessor is given."""

    elements: int
    warps: int
    programs: int = 0

    def blocks(self, channels: int) -> tuple[int, int]:
        """BLOCK_M and BLOCK_C: up to 64 channels side by side, 128 bytes of bf16."""
        block_c = min(max(8, next_power_of_2(channels)), 64)
        return self.elements // block_c, block_c

    def reducing(self, m: int, channels: int, device: torch.device) -> int:
        """Programs that share the rows of one column of tiles."""
        block_m, block_c = self.blocks(channels)
        columns = cdiv(channels, block_c)
        share = self.programs * multiprocessors(device) // columns
        return max(1, min(cdiv(m, block_m), share))


# by bytes of an element
TILES = {2: Tile(4096, 4, 4), 4: Tile(2048, 4, 8)}


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance [C] of x [N, C, H, W] in float32 (float64 for float64)."""
    x = x if x.dtype == torch.float64 else x.float()
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean, var


@triton.jit
def tile_position(c, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's index down the rows, its rows within a tile [BLOCK_M, 1] and its channels
    [BLOCK_C]. Tiles side by side come first, so that what runs together reads whole rows."""
    columns = tl.cdiv(c, BLOCK_C)
    channels = (tl.program_id(0) % columns) * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.program_id(0) // columns, tl.arange(0, BLOCK_M)[:, None], channels


@triton.jit
def combine(n, mean, m2):
    """Chan's formula over axis 0: n [G, 1] counts, mean and M2 [G, C] -> n [1], mean, M2 [C]."""
    total = tl.sum(n, axis=0)
    middle = tl.div_rn(tl.sum(n * mean, axis=0), tl.maximum(total, 1.0))
    # far from zero the sum above has lost digits; about itself it has not
    middle += tl.div_rn(tl.sum(n * (mean - middle[None, :]), axis=0), tl.maximum(total, 1.0))
    away = mean - middle[None, :]
    return total, middle, tl.sum(m2 + n * away * away, axis=0)


@triton.jit
def _moments(x_ptr, m, c, programs, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    program, rows, channels = tile_position(c, BLOCK_M, BLOCK_C)
    cols = channels[None, :]
    tiles = tl.cdiv(m, BLOCK_M)
    mine = tl.cdiv(tiles - program, programs)
    mean = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for k in range(mine):
        tile = program + k * programs
        inside = (rows < m - tile * BLOCK_M) & (cols < c)
        tile_ptr = x_ptr + tile.to(tl.int64) * BLOCK_M * c
        x = tl.load(tile_ptr + rows * c + cols, mask=inside, other=0.0).to(tl.float32)
        away = x - mean
        updated = mean + away * (1.0 / (k + 1.0))
        m2 = tl.where(inside, m2 + away * (x - updated), m2)
        mean = tl.where(inside, updated, mean)
    # the last tile may be short of rows: those lanes saw one value fewer
    last = program + (mine - 1) * programs
    n = (mine - tl.where(rows < m - last * BLOCK_M, 0, 1)).to(tl.float32)
    _, mean, m2 = combine(n, mean, m2)
    return mean, m2


@triton.jit
def store_partial(partials_ptr, mean, m2, partial, partials, column, width, inside):
    """Write mean and M2 [BLOCK_C] of partial number `partial` into partials [2, P, width]."""
    at = partials_ptr + partial * width + column
    tl.store(at, mean, mask=inside)
    tl.store(at + partials * width, m2, mask=inside)


@triton.jit
def _stats_kernel(
    x_ptr,
    r_ptr,
    partials_ptr,
    m,
    c,
    programs,
    HAS_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program, _, column = tile_position(c, BLOCK_M, BLOCK_C)
    mean, m2 = _moments(x_ptr, m, c, programs, BLOCK_M, BLOCK_C)
    if HAS_R:
        width = 2 * c
        r_mean, r_m2 = _moments(r_ptr, m, c, programs, BLOCK_M, BLOCK_C)
        store_partial(partials_ptr, r_mean, r_m2, program, programs, column + c, width, column < c)
    else:
        width = c
    store_partial(partials_ptr, mean, m2, program, programs, column, width, column < c)


@triton.jit
def _merge_kernel(
    partials_ptr,
    merged_ptr,
    m,
    c,
    rows,
    partials,
    groups,
    VARIANCE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Group g of the partials, g, g + groups, g + 2*groups ...: mean, and M2 or the variance."""
    columns = tl.cdiv(c, BLOCK_C)
    group = tl.program_id(0) // columns
    cols = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    tiles = tl.cdiv(m, rows)
    n = tl.zeros((1,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first in range(group, partials, BLOCK_P * groups):
        p = first + tl.arange(0, BLOCK_P)[:, None] * groups
        short = tl.where(p == (tiles - 1) % partials, tiles * rows - m, 0)
        count = tl.where(p < partials, tl.cdiv(tiles - p, partials) * rows - short, 0)
        at = partials_ptr + p.to(tl.int64) * c + cols[None, :]
        inside = (p < partials) & (cols < c)[None, :]
        p_mean = tl.load(at, mask=inside, other=0.0)
        p_m2 = tl.load(at + partials * c, mask=inside, other=0.0)
        more, t_mean, t_m2 = combine(count.to(tl.float32), p_mean, p_m2)
        away = t_mean - mean
        share = tl.div_rn(more, n + more)
        m2 += t_m2 + away * away * n * share
        mean += away * share
        n += more
    if VARIANCE:
        m2 = tl.div_rn(m2, n)
    store_partial(merged_ptr, mean, m2, group, groups, cols, c, cols < c)


def _merge(
    partials: torch.Tensor, m: int, rows: int, groups: int, block_p: int, block_c: int
) -> torch.Tensor:
    _, count, c = partials.shape
    merged = torch.empty((2, groups, c), dtype=torch.float32, device=partials.device)
    grid = (cdiv(c, block_c) * groups,)
    args = (partials, merged, m, c, rows, count, groups)
    run(_merge_kernel, grid, *args, VARIANCE=groups == 1, BLOCK_P=block_p, BLOCK_C=block_c,
        num_warps=8)  # fmt: skip
    return merged


def merge(partials: torch.Tensor, m: int, rows: int) -> torch.Tensor:
    """Launch the merge of partials float32 [2, P, C] (mean, M2) over tiles of `rows` of the m
    rows; returns float32 [2, C]: mean and biased variance."""
    count = partials.shape[1]
    # partials of one tile each fold to partials of the tiles g, g + FOLDED, ...: the same order
    if count > FOLD_ABOVE and count == cdiv(m, rows):
        partials = _merge(partials, m, rows, FOLDED, FOLD_PARTIALS, FOLD_CHANNELS)
        count = FOLDED
    block_p = min(next_power_of_2(count), MERGE_PARTIALS)
    return _merge(partials, m, rows, 1, block_p, MERGE_CHANNELS)[:, 0]


def statistics(x: torch.Tensor, r: torch.Tensor | None = None) -> torch.Tensor:
    """Launch the statistics of x [N, C, H, W], and of r of the same shape and dtype, in two
    launches; returns float32 [2, T, C] for T tensors: means, then biased variances."""
    x = nhwc(x)
    n, c, h, w = x.shape
    m, tensors = n * h * w, 1 if r is None else 2
    if m == 0:
        return torch.zeros((2, tensors, c), dtype=torch.float32, device=x.device)
    tile = TILES[x.element_size()]
    block_m, block_c = tile.blocks(c)
    programs = tile.reducing(m, c, x.device)
    partials = torch.empty((2, programs, tensors * c), dtype=torch.float32, device=x.device)
    run(
        _stats_kernel,
        (programs * cdiv(c, block_c),),
        x,
        x if r is None else nhwc(r),
        partials,
        m,
        c,
        programs,
        HAS_R=r is not None,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=tile.warps,
    )
    return merge(partials, m, block_m).view(2, tensors, c)


@torch.library.custom_op("lapis::batch_statistics", mutates_args=())
def batch_statistics(x: torch.Tensor, r: torch.Tensor | None) -> torch.Tensor:
    """Means, then biased variances: float32 [2, T, C] of x [N, C, H, W] and, if it is there, of r
    of the same shape and dtype. An empty batch gives zeros. Not differentiable."""
    if runs_triton(x):
        return statistics(x, r)
    tensors = [x] if r is None else [x, r]
    if x.numel() == 0:
        return torch.zeros((2, len(tensors), x.shape[1]), device=x.device)
    means, variances = zip(*(reference(t) for t in tensors), strict=True)
    return torch.stack((torch.stack(means), torch.stack(variances)))


@batch_statistics.register_fake
def _(x: torch.Tensor, r: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((2, 1 if r is None else 2, x.shape[1]), dtype=torch.float32)


@triton.jit
def _track_kernel(
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    mean_ptr,
    var_ptr,
    c,
    momentum,
    unbiased,
    CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # one program for all channels: nothing else reads the count that it writes
    batches = tl.load(batches_ptr) + 1
    factor = tl.div_rn(1.0, batches.to(tl.float32)) if CUMULATIVE else momentum
    for first in range(0, c, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        inside = cols < c
        mean = tl.load(mean_ptr + cols, mask=inside, other=0.0) * factor
        var = tl.load(var_ptr + cols, mask=inside, other=0.0) * unbiased * factor
        mean += tl.load(running_mean_ptr + cols, mask=inside, other=0.0) * (1.0 - factor)
        var += tl.load(running_var_ptr + cols, mask=inside, other=0.0) * (1.0 - factor)
        tl.store(running_mean_ptr + cols, mean, mask=inside)
        tl.store(running_var_ptr + cols, var, mask=inside)
    tl.store(batches_ptr, batches)


def move(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    num_batches_tracked: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    unbiased: float,
    momentum: float | None,
) -> None:
    """Launch the update of the three buffers; the batch's variance is var*unbiased."""
    c = mean.shape[0]
    block = min(next_power_of_2(c), TRACK_CHANNELS)
    buffers = (running_mean, running_var, num_batches_tracked)
    args = (*buffers, mean.contiguous(), var.contiguous(), c, momentum or 0.0, unbiased)
    run(_track_kernel, (1,), *args, CUMULATIVE=momentum is None, BLOCK_C=block)


@torch.library.custom_op(
    "lapis::track", mutates_args=("running_mean", "running_var", "num_batches_tracked")
)
def _track_op(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    num_batches_tracked: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    unbiased: float,
    momentum: float | None,
) -> None:
    if runs_triton(mean):
        move(running_mean, running_var, num_batches_tracked, mean, var, unbiased, momentum)
        return
    num_batches_tracked += 1
    factor = 1.0 / num_batches_tracked.float() if momentum is None else momentum
    running_mean.mul_(1.0 - factor).add_(mean * factor)
    running_var.mul_(1.0 - factor).add_(var * unbiased * factor)


def track(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    num_batches_tracked: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    count: int,
    momentum: float | None,
) -> None:
    """Move the buffers of a BatchNorm in place, as nn.BatchNorm2d does after a batch.

    running_mean, running_var: float32 [C], contiguous. num_batches_tracked: int64 scalar.
    mean, var: float32 [C], the batch's mean and biased variance over `count` values a channel.
    momentum: the weight of the batch, None for the average of all batches (1 / their number).

    Raises ValueError for another shape or dtype, and for a count of 1: it has no variance.
    """
    check(count != 1, lambda: "the unbiased variance needs more than one value per channel")
    channels = {"running_mean": running_mean, "running_var": running_var, "mean": mean, "var": var}
    for name, value in channels.items():
        check(
            value.shape == running_mean.shape and value.dim() == 1 and value.dtype == torch.float32,
            lambda name=name, value=value: (
                f"{name} must be float32 [C], not {value.dtype} {tuple(value.shape)}"
            ),
        )
    check(
        running_mean.is_contiguous() and running_var.is_contiguous(),
        lambda: "running_mean and running_var must be contiguous",
    )
    check(
        num_batches_tracked.numel() == 1 and num_batches_tracked.dtype == torch.int64,
        lambda: f"num_batches_tracked must be one int64, not {num_batches_tracked.dtype}",
    )
    buffers = (running_mean, running_var, num_batches_tracked)
    _track_op(*buffers, mean.detach(), var.detach(), count / (count - 1), momentum)
