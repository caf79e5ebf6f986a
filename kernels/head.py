"""head: cross-entropy with label smoothing and mixed labels, from logits to their gradient.

    targets    t = (1 - e) * (lam * onehot(a) + (1 - lam) * onehot(b)) + e / K
    forward    loss = mean_n (logsumexp(z_n) - t_n . z_n)
    backward   dz = dloss * (softmax(z) - t) / N

Launches, forward + backward: PyTorch's cross-entropy of bf16 logits takes 3 + 3, with label
smoothing 14 + 9, with mixed labels twice that, and 3 more count the correct answers. Here 1 + 1
with everything (3 + 1 when N * K fills more than one program). Bytes hardly matter at this size:
N * K logits are read twice and written once, PyTorch's cast to float32 alone moves as many.

The backward pass recomputes the softmax from the logits instead of scaling gradients that the
forward pass stored: as many launches, fewer bytes, and unscaled they would underflow in float16.

The pooling before it is `avg_pool`. The fully connected layer between them is left to cuBLAS: 1 + 3
launches of at most 0.26 GFLOP (N = 256, K = 1000). Joined to the pooling, every image would read
all weights; joined to the loss, the loss would have to move into the model, and the gradient of
the weights needs a product over the whole batch in either case.

Layout: logits [N, K], any strides. Sums are float32 in a fixed order. Where Triton cannot run, and
above MAX_CLASSES classes, the op is `reference`.
"""

import torch
import torch.nn.functional as F

from kernels.launch import cdiv, check, next_power_of_2, run, runs_triton, tl, triton
from kernels.numerics import rounded
from kernels.spec import Cost, Inputs, KernelSpec, Shape

MAX_CLASSES = 16384  # one row of logits stays in the registers of 16 warps
ONE_PROGRAM = 8192  # padded logits one program takes on before the batch is split
SPLIT = 2048  # padded logits a program when it is


def reference(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    labels_b: torch.Tensor | None = None,
    lam: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy, at least float32, by linearity in the targets where labels are mixed."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    a = F.cross_entropy(z, labels, reduction="none", label_smoothing=label_smoothing)
    if labels_b is not None:
        b = F.cross_entropy(z, labels_b, reduction="none", label_smoothing=label_smoothing)
        a = lam * a + (1 - lam) * b
    return a.mean()


@triton.jit
def _rows(
    z_ptr,
    a_ptr,
    b_ptr,
    lam_ptr,
    stride_lam,
    smoothing,
    batch,
    classes,
    MIXED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What both passes need of a block of rows: offsets and mask [BLOCK_N, BLOCK_K], logits, soft
    targets, log-sum-exp [BLOCK_N, 1], and whether each row's first largest logit is at its label.
    A label that is no class makes its row's targets NaN: nothing can be raised from here."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    rows = n < batch
    inside = rows & (k < classes)
    at = n.to(tl.int64) * classes + k
    z = tl.load(z_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.where(rows, tl.max(z, axis=1, keep_dims=True), 0.0)
    lse = top + tl.log(tl.sum(tl.exp(z - top), axis=1, keep_dims=True))

    a = tl.load(a_ptr + n, mask=rows, other=0)
    known = (a >= 0) & (a < classes)
    t = tl.where(k == a, 1.0, 0.0)
    if MIXED:
        b = tl.load(b_ptr + n, mask=rows, other=0)
        known = known & (b >= 0) & (b < classes)
        lam = tl.load(lam_ptr + n * stride_lam, mask=rows, other=0.0)
        t = lam * t + (1.0 - lam) * tl.where(k == b, 1.0, 0.0)
    t = (1.0 - smoothing) * t + smoothing / classes
    t = tl.where(known, t, float("nan"))
    first = tl.min(tl.where(z == top, k, BLOCK_K), axis=1, keep_dims=True)
    return at, inside, z, t, lse, rows & (first == a)


@triton.jit
def _forward_kernel(
    z_ptr,
    a_ptr,
    b_ptr,
    lam_ptr,
    loss_ptr,
    correct_ptr,
    stride_lam,
    smoothing,
    batch,
    classes,
    MIXED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # grid (N / BLOCK_N,); loss and correct: one partial sum a program
    _, inside, z, t, lse, hit = _rows(
        z_ptr, a_ptr, b_ptr, lam_ptr, stride_lam, smoothing, batch, classes, MIXED, BLOCK_N, BLOCK_K
    )
    # a target of 0 leaves a logit of -inf out, as in PyTorch
    each = tl.sum(tl.where(inside & (t != 0.0), t * (lse - z), 0.0), axis=1)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(each) / batch)
    tl.store(correct_ptr + tl.program_id(0), tl.sum(tl.sum(hit.to(tl.int64), axis=1)))


@triton.jit
def _backward_kernel(
    dloss_ptr,
    z_ptr,
    a_ptr,
    b_ptr,
    lam_ptr,
    dz_ptr,
    stride_lam,
    smoothing,
    batch,
    classes,
    MIXED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # grid (N / BLOCK_N,)
    at, inside, z, t, lse, _ = _rows(
        z_ptr, a_ptr, b_ptr, lam_ptr, stride_lam, smoothing, batch, classes, MIXED, BLOCK_N, BLOCK_K
    )
    dz = tl.load(dloss_ptr) / batch * (tl.exp(z - lse) - t)
    tl.store(dz_ptr + at, rounded(dz, dz_ptr.dtype.element_ty), mask=inside)


def _tiles(batch: int, classes: int, most: int) -> dict[str, int]:
    """Rows and columns of a program that takes on at most `most` padded logits, and its warps."""
    columns = next_power_of_2(classes)
    rows = min(next_power_of_2(batch), max(1, most // columns))
    warps = min(16, max(1, rows * columns // 512))
    return {"BLOCK_N": rows, "BLOCK_K": columns, "num_warps": 1 << (warps.bit_length() - 1)}


def forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    smoothing: float,
    labels_b: torch.Tensor | None,
    lam: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the loss: (loss float32 [], correct answers int64 [])."""
    n, k = logits.shape
    one = _tiles(n, k, ONE_PROGRAM)
    tiles = one if one["BLOCK_N"] >= n else _tiles(n, k, SPLIT)
    parts = cdiv(n, tiles["BLOCK_N"])
    loss = logits.new_empty(parts, dtype=torch.float32)
    correct = labels.new_empty(parts)
    *mix, stride_lam = _mixed(labels, logits, labels_b, lam)
    args = (logits, labels, *mix, loss, correct, stride_lam, smoothing, n, k)
    run(_forward_kernel, (parts,), *args, MIXED=lam is not None, **tiles)
    return (loss.view(()), correct.view(())) if parts == 1 else (loss.sum(), correct.sum())


def backward(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    smoothing: float,
    labels_b: torch.Tensor | None,
    lam: torch.Tensor | None,
) -> torch.Tensor:
    """Launch the gradient of the logits [N, K]; dloss float32 []."""
    n, k = logits.shape
    dz = torch.empty_like(logits)
    tiles = _tiles(n, k, SPLIT)  # no sum over the batch: small programs fill the device
    *mix, stride_lam = _mixed(labels, logits, labels_b, lam)
    args = (dloss, logits, labels, *mix, dz, stride_lam, smoothing, n, k)
    grid = (cdiv(n, tiles["BLOCK_N"]),)
    run(_backward_kernel, grid, *args, MIXED=lam is not None, **tiles)
    return dz


def _mixed(labels, logits, labels_b, lam) -> tuple[torch.Tensor, torch.Tensor, int]:
    # without mixing any pointer will do: the kernel does not follow it
    if lam is None:
        return labels, logits, 0
    return labels_b, lam, lam.stride(0) if lam.dim() else 0


@torch.library.custom_op("lapis::cross_entropy", mutates_args=())
def _op(
    logits: torch.Tensor,
    labels: torch.Tensor,
    smoothing: float,
    labels_b: torch.Tensor | None,
    lam: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if _runs(logits):
        return forward(logits, labels, smoothing, labels_b, lam)
    loss = reference(logits, labels, smoothing, labels_b, lam)
    return loss.float(), (logits.argmax(dim=1) == labels).sum()


@_op.register_fake
def _(logits, labels, smoothing, labels_b, lam):
    return logits.new_empty((), dtype=torch.float32), labels.new_empty(())


@torch.library.custom_op("lapis::cross_entropy_backward", mutates_args=())
def _backward_op(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    smoothing: float,
    labels_b: torch.Tensor | None,
    lam: torch.Tensor | None,
) -> torch.Tensor:
    if _runs(logits):
        return backward(dloss, logits, labels, smoothing, labels_b, lam)
    # written out: autograd is out of reach inside the implementation of an op
    z = logits if logits.dtype == torch.float64 else logits.float()
    classes = logits.shape[1]
    target = F.one_hot(labels, classes).to(z.dtype)
    if labels_b is not None:
        share = lam.view(-1, 1).to(z.dtype)
        target = share * target + (1 - share) * F.one_hot(labels_b, classes)
    target = (1 - smoothing) * target + smoothing / classes
    return (dloss / len(z) * (z.softmax(dim=1) - target)).to(logits.dtype)


@_backward_op.register_fake
def _(dloss, logits, labels, smoothing, labels_b, lam):
    return torch.empty_like(logits)


def _runs(logits: torch.Tensor) -> bool:
    # the mean of no samples is NaN: not worth a kernel
    return runs_triton(logits) and len(logits) > 0 and logits.shape[1] <= MAX_CLASSES


def _save(ctx, inputs, output) -> None:
    logits, labels, ctx.smoothing, labels_b, lam = inputs
    ctx.save_for_backward(logits, labels, labels_b, lam)


def _differentiate(ctx, dloss, _dcorrect):
    logits, labels, labels_b, lam = ctx.saved_tensors
    dz = _backward_op(dloss, logits, labels, ctx.smoothing, labels_b, lam)
    return dz, None, None, None, None


_op.register_autograd(_differentiate, setup_context=_save)


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    labels_b: torch.Tensor | None = None,
    lam: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of logits [N, K] against int64 labels [N]: float32 [].

    With labels_b int64 [N] and lam float32 [] or [N] the targets are lam * labels + (1 - lam) *
    labels_b (mixup, cutmix). A label outside 0..K-1 makes the loss NaN on a GPU and raises on a
    CPU; an empty batch gives NaN. Raises ValueError for wrong shapes, dtypes or devices.
    """
    return loss_and_correct(logits, labels, label_smoothing, labels_b, lam)[0]


def loss_and_correct(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    labels_b: torch.Tensor | None = None,
    lam: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cross_entropy` and how many rows have their first largest logit at `labels`: int64 []."""
    check(logits.dim() == 2, lambda: f"logits must be [N, K], not {tuple(logits.shape)}")
    check(logits.shape[1] > 0, lambda: f"logits {tuple(logits.shape)} have no classes")
    check(
        0.0 <= label_smoothing <= 1.0,
        lambda: f"label_smoothing must lie in 0..1, not {label_smoothing}",
    )
    check(
        (labels_b is None) == (lam is None),
        lambda: "labels_b and lam come together: give both or neither",
    )
    _check_labels("labels", labels, logits)
    if lam is not None:
        _check_labels("labels_b", labels_b, logits)
        check(
            lam.dtype == torch.float32
            and lam.shape in ((), labels.shape)
            and lam.device == logits.device,
            lambda: (
                f"lam must be float32 [] or [{len(logits)}] on {logits.device}, not "
                f"{lam.dtype} {tuple(lam.shape)} on {lam.device}"
            ),
        )
    logits, labels = logits.contiguous(), labels.contiguous()
    labels_b = None if labels_b is None else labels_b.contiguous()
    return _op(logits, labels, label_smoothing, labels_b, lam)


def _check_labels(name: str, labels: torch.Tensor, logits: torch.Tensor) -> None:
    check(
        labels.dtype == torch.int64
        and labels.shape == logits.shape[:1]
        and labels.device == logits.device,
        lambda: (
            f"{name} must be int64 [{len(logits)}] on {logits.device}, not "
            f"{labels.dtype} {tuple(labels.shape)} on {labels.device}"
        ),
    )


def _make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    n, k = shape
    logits = 3 * torch.randn(n, k, generator=generator, device=generator.device)
    labels = torch.randint(k, (2, n), generator=generator, device=generator.device).to(device)
    lam = torch.rand(n, generator=generator, device=generator.device).to(device)
    return {
        "logits": logits.to(device, dtype).requires_grad_(),
        "labels": labels[0],
        "label_smoothing": 0.1,
        "labels_b": labels[1],
        "lam": lam,
    }


def _launch(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float,
    labels_b: torch.Tensor,
    lam: torch.Tensor,
) -> None:
    for mix in ((None, None), (labels_b, lam)):
        loss, _ = forward(logits, labels, label_smoothing, *mix)
        backward(loss, logits, labels, label_smoothing, *mix)


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    n, k = shape
    forward = Cost(8.0 * n * k, float(n * k * itemsize + 24 * n))
    return {"forward": forward, "backward": Cost(8.0 * n * k, forward.bytes + n * k * itemsize)}


SPEC = KernelSpec(
    "cross_entropy",
    reference,
    cross_entropy,
    _make_inputs,
    _launch,
    _cost,
    ((32, 5), (32, 1000), (256, 1000)),
)
