"""The training step: one function of tensors that asks the device nothing, so that it can run from
a CUDA graph as well as launch by launch.

A step whose loss is not finite, or under float16 one of whose gradients is not, changes nothing but
the loss scale: weights, optimizer state, running statistics and moving average stay bit for bit.
The device decides that; the host learns of it from what the step returns.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.weight_copies import WeightCopies
from profiling import nvtx
from train import distributed
from train.config import OptimConfig
from train.optim import LossScale, WeightAverage, build_optimizer, update

FOCUS = 2.0  # exponent of the focal loss: the one its authors found best


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Mixed precision in `dtype`; None is full precision."""
    # no cache: a network uses each weight once, and in a CUDA graph a cached cast of the weights
    # would outlive the memory it stands in
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


class TrainingStep:
    """One update of the model's weights from one batch, and all that the update changes.

    model: on its device, in training mode when the step runs. The learning rate is the caller's to
    set with `set_rate`, the moving average's decay to `prepare`. fused: with an
    `amp_dtype`, update the weights, float32, by our kernels, which leave copies of them in that
    type for the next forward. make_batch: what makes the images and labels of a batch of the
    step's first two inputs; a part of the step, and of its graph. class_weights: float32 [K] on the
    device, for the loss `weighted_ce`.

    With `accumulate` the batch goes through the network in that many parts, one after the other:
    the gradients are those of the mean over all of it, and processes exchange them once.

    probes: called when the gradients stand in every `grad`, unscaled and not clipped; while there
    is one, no step is replayed from a graph. whole: the images of the batch on all processes
    together, the caller's to set where there are several.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        amp_dtype: torch.dtype | None,
        fused: bool = False,
        make_batch: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        class_weights: Tensor | None = None,
    ):
        self.model = model
        self.make_batch = make_batch
        self.config = config
        self.amp_dtype = amp_dtype
        self.device = next(model.parameters()).device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.buffers = Buffers(model)
        self.optimizer = build_optimizer(model, config)
        self.scale = LossScale(self.device, enabled=amp_dtype == torch.float16)
        self.average = WeightAverage(model, config.ema) if config.ema else None
        self.probes: list[Callable[[], None]] = []
        self.whole = 0
        self.copies = WeightCopies(model, amp_dtype) if fused and amp_dtype else None
        self.class_weights = class_weights if config.loss == "weighted_ce" else None

    def __call__(
        self,
        first: Tensor,
        second: Tensor,
        partner: Tensor | None = None,
        lam: Tensor | None = None,
        box: Tensor | None = None,
    ) -> Tensor:
        """Train on images [N, 3, H, W] with labels int64 [N], or on what `make_batch` makes of
        `first` and `second`; returns float32 [3]: the loss, how many images were classified right,
        and 1 if the update was skipped. On several processes these are their shares of one batch,
        and what is returned is of it all.

        partner int64 [N], lam float32 []: mixup, image i becomes lam of itself and 1 - lam of image
        partner[i], and so does the loss. box float32 [4]: cutmix, see `mix`.
        """
        self.refresh()
        before = self.buffers.copy()
        images, labels = self.make_batch(first, second) if self.make_batch else (first, second)

        # ---- the training step ------------------------------------------------------------------
        others = None
        if partner is not None:
            others = labels[partner]
            images, lam = mix(images, images[partner], lam, box)
        precision = autocast(self.device, self.amp_dtype)
        measure = partial(self.loss, total=self.total(labels))
        loss = correct = 0.0
        for x, y, other in in_parts(self.config.accumulate, images, labels, others):
            with nvtx.range("forward", x.shape), precision, self.copies_in_use():
                logits = self.model(x)
            share = mixed(measure, logits, y, other, lam)
            with nvtx.range("backward"):
                self.scale.scaled(share).backward()
            loss = loss + share.detach()
            correct = correct + mixed(count_correct, logits, y, other, lam)
        if distributed.size() > 1:
            loss, correct = self.exchanged(loss, correct, len(labels))
        skip = self.scale.unscale([p.grad for p in self.parameters if p.grad is not None], loss)
        for probe in self.probes:
            probe()
        if self.config.clip_grad:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad)
        with nvtx.range("optimizer"):
            update(self.optimizer, skip, self.copies)
        self.optimizer.zero_grad(set_to_none=True)
        self.scale.update(skip)
        # ------------------------------------------------------------------------------------------

        self.buffers.put_back(before, skip)
        if self.average is not None:
            self.average.update(skip)
        return torch.stack([loss, correct, skip])

    def exchanged(self, loss: Tensor, correct: Tensor, images: int) -> list[Tensor]:
        """Make gradients and running statistics those of all processes' shares together; returns
        `loss` and `correct` likewise. images: in the share of this one."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        statistics = [b for b in self.buffers.all if b.is_floating_point()]
        with nvtx.range("exchange"):
            return distributed.exchange(gradients, statistics, [loss, correct], images / self.whole)

    def refresh(self, anew: bool = False) -> None:
        """Bring the weights' copies up to date, where somebody else has changed a weight in a way
        that PyTorch counts; `anew`, in any case."""
        if self.copies is not None:
            self.copies.refresh(anew)

    def count_update(self) -> None:
        """Tell PyTorch that all weights have changed, and that their copies went with them."""
        torch.autograd.graph.increment_version(self.parameters)
        if self.copies is not None:
            self.copies.written()

    def copies_in_use(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.copies is None else self.copies.in_use()

    def loss(self, logits: Tensor, labels: Tensor, total: Tensor | float | None = None) -> Tensor:
        """Mean cross-entropy in float32, plain, weighted by class, or focal: an image that is
        named with probability p counts (1 - p)^2 of it (Lin et al. 2017). logits [N, K], labels
        int64 [N]. With the `total` of a larger batch, what these images add to its mean."""
        logits, smoothing = logits.float(), self.config.label_smoothing
        if self.config.loss == "focal":
            each = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
            named = torch.exp(-F.cross_entropy(logits, labels, reduction="none"))
            mean = ((1 - named) ** FOCUS * each).mean()
        else:
            weight = self.class_weights
            mean = F.cross_entropy(logits, labels, weight, label_smoothing=smoothing)
        return mean if total is None else mean * (self.weight(labels) / total)

    def weight(self, labels: Tensor) -> Tensor | float:
        """What these labels weigh in a mean loss."""
        return len(labels) if self.class_weights is None else self.class_weights[labels].sum()

    def total(self, labels: Tensor) -> Tensor | float | None:
        """What the whole batch weighs, of which `labels` are the share of this process; None where
        that is all of it, in one part."""
        if distributed.size() == 1:
            return None if self.config.accumulate == 1 else self.weight(labels)
        if self.class_weights is None:
            return self.whole
        return distributed.sum_(self.weight(labels))

    def tensors(self) -> list[Tensor]:
        """Everything a step changes, but for the copies, which follow from the weights."""
        slots = [slot for state in self.optimizer.state.values() for slot in state.values()]
        average = [] if self.average is None else list(self.average.state.values())
        weights = [*self.model.parameters(), *self.model.buffers()]
        return [*(w.detach() for w in weights), *slots, *average, *self.scale.tensors()]


def mix(images: Tensor, others: Tensor, lam: Tensor, box: Tensor | None) -> tuple[Tensor, Tensor]:
    """lam of `images` and 1 - lam of `others`, [N, 3, H, W]; within `box`, the others alone. Also
    returns the share of `images` in the pixels of the result, float32 [].

    box: float32 [4], top, left, bottom and right in 0..1, which are rounded to whole pixels.
    """
    blend = images.lerp(others, (1 - lam).to(images.dtype))
    if box is None:
        return blend, lam
    height, width = images.shape[2:]
    top, bottom = (box[0::2] * height).round()
    left, right = (box[1::2] * width).round()
    y = torch.arange(height, device=box.device)[:, None]
    x = torch.arange(width, device=box.device)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    area = (bottom - top) * (right - left)
    return torch.where(inside, others, blend), lam * (1 - area / (height * width))


def mixed(measure, logits: Tensor, labels: Tensor, others: Tensor | None, lam: Tensor | None):
    """measure(logits, labels), with mixup lam of that and 1 - lam of the others' labels."""
    own = measure(logits, labels)
    return own if others is None else lam * own + (1 - lam) * measure(logits, others)


def in_parts(count: int, *tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """At most `count` parts of a batch, as even as can be, and each of two images or more: batch
    normalisation cannot train on one. Views along each tensor's first axis; None stays."""
    count = min(count, max(1, len(tensors[0]) // distributed.LEAST))
    return zip(
        *([None] * count if t is None else t.tensor_split(count) for t in tensors), strict=True
    )


def class_weights(counts: Sequence[int]) -> Tensor:
    """N / (K n) for a class of n among N images of K classes, so that classes weigh alike; 0 for a
    class without any: float32 [K]."""
    images = torch.tensor(counts, dtype=torch.float32)
    return torch.where(images > 0, images.sum() / (len(images) * images.clamp(min=1)), 0.0)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of logits [N, K] are largest at their label: float32 []."""
    return (logits.argmax(1) == labels).sum(dtype=torch.float32)


class Buffers:
    """The buffers of a model, its running statistics: the forward pass moves them before anyone
    knows whether the step counts."""

    def __init__(self, model: nn.Module):
        self.all = list(model.buffers())
        dtypes = dict.fromkeys(buffer.dtype for buffer in self.all)
        self._groups = [[b for b in self.all if b.dtype == dtype] for dtype in dtypes]

    def copy(self) -> list[Tensor]:
        """The values now, a flat tensor for each dtype."""
        return [torch.cat([buffer.reshape(-1) for buffer in group]) for group in self._groups]

    @torch.no_grad()
    def put_back(self, before: list[Tensor], skip: Tensor) -> None:
        """Where `skip` is 1, return to what `copy` returned."""
        skip = skip.bool()
        for group, old, new in zip(self._groups, before, self.copy(), strict=True):
            kept = torch.where(skip, old, new).split([buffer.numel() for buffer in group])
            values = [value.view(buffer.shape) for value, buffer in zip(kept, group, strict=True)]
            torch._foreach_copy_(group, values)
