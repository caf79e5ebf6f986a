"""Optimizers, learning-rate schedules, the moving average of weights and the scaling of losses.

What changes from step to step is in tensors, and `skip` (float32 [], 1 or 0) makes an update of any
of them a no-op, so that a CUDA graph can hold the whole step.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from models import LAST_STAGE, stage_of
from models.weight_copies import WeightCopies
from train.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD or AdamW; weight decay reaches matrices and filters, not biases and normalisation.

    Every step reads its learning rate in tensors, which `set_rate` fills: those of `layer_decay`
    differ from stage to stage (Howard and Ruder 2018).
    """
    device = next(model.parameters()).device
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        share = config.layer_decay ** (LAST_STAGE - stage_of(name))
        members.setdefault((share, p.ndim > 1), []).append(p)
    groups = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr": torch.zeros((), device=device),
            "share": share,
        }
        for (share, decays), parameters in members.items()
    ]
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, fused=True, capturable=True)
        slots = ("exp_avg", "exp_avg_sq")
    else:
        optimizer = torch.optim.SGD(
            groups, momentum=config.momentum, nesterov=config.nesterov, fused=True
        )
        slots = ("momentum_buffer",) if config.momentum else ()
    # made here, not by the first step: if that is skipped, SGD leaves its momentum uninitialised
    for p in model.parameters():
        optimizer.state[p] = {slot: torch.zeros_like(p, requires_grad=False) for slot in slots}
        if config.optimizer == "adamw":
            optimizer.state[p]["step"] = torch.zeros((), device=p.device)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the last layer for the next step; each group has its share of it."""
    for group in optimizer.param_groups:
        group["lr"].fill_(rate * group["share"])


def update(optimizer: torch.optim.Optimizer, skip: Tensor, copies: WeightCopies | None) -> None:
    """One step of what `build_optimizer` made; none where `skip` is 1.

    copies: of the weights, written by the same launches of our kernels; without them the step is
    PyTorch's.
    """
    if copies is None:
        optimizer.found_inf = skip
        optimizer.step()
        # PyTorch's fused kernels do not count what they write
        torch.autograd.graph.increment_version(list(optimizer.state))
        return
    for group in optimizer.param_groups:
        trained = [p for p in group["params"] if p.grad is not None]
        _fused_step(optimizer, group, [p for p in trained if p in copies], copies, skip)
        _fused_step(optimizer, group, [p for p in trained if p not in copies], None, skip)


def _fused_step(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    weights: list[Tensor],
    copies: WeightCopies | None,
    skip: Tensor,
) -> None:
    """A step of some weights of a group, which have copies all or none."""
    written = [] if copies is None else copies.of(weights)
    scalars = (group["lr"], skip)

    def slots(name: str) -> list[Tensor]:
        return [optimizer.state[p][name] for p in weights]

    rule = {"weight_decay": group["weight_decay"]}
    gradients = [p.grad for p in weights]
    if isinstance(optimizer, torch.optim.AdamW):
        state = (slots("exp_avg"), slots("exp_avg_sq"), slots("step"))
        kernels.adamw_(weights, gradients, *state, written, *scalars, **rule)
    else:
        rule |= {"momentum": group["momentum"], "nesterov": group["nesterov"]}
        momenta = slots("momentum_buffer") if group["momentum"] else []
        kernels.sgd_(weights, gradients, momenta, written, *scalars, **rule)
    if copies is not None:
        copies.written(weights)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of step 0 <= step < total_steps of a run."""
    peak = config.lr
    if config.schedule == "cosine":  # Loshchilov and Hutter 2017
        return _cosine(peak, 0.0, step / total_steps)
    if config.schedule == "onecycle" and total_steps > 1:  # Smith and Topin 2018
        top, last = 0.3 * total_steps - 1, total_steps - 1
        if step <= top:
            return _cosine(peak / 25, peak, step / top)
        return _cosine(peak, peak / 25e4, (step - top) / (last - top))
    if config.schedule == "step":
        milestones = (round(0.6 * total_steps), round(0.85 * total_steps))
        return peak * 0.1 ** sum(step >= milestone for milestone in milestones)
    if config.schedule == "cyclic":  # four triangles (Smith 2017)
        half = max(1, total_steps // 8)
        height = 1 - abs(step % (2 * half) / half - 1)
        return peak * (0.1 + 0.9 * height)
    return peak


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


class WeightAverage:
    """Exponential moving average of a model's parameters and buffers (Polyak and Juditsky 1992).

    The decay warms up as (1 + n) / (10 + n) after n steps, so that early weights are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        weights = model.state_dict()  # shares the model's memory, whatever it holds later
        self.decay = decay
        self.state = {name: value.clone() for name, value in weights.items()}
        pairs = [(value, weights[name]) for name, value in self.state.items()]
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._share = torch.zeros((), device=pairs[0][0].device)

    def prepare(self, steps: int) -> None:
        """Set the decay that `update` uses in step number `steps`, counted from 1."""
        self._share.fill_(1.0 - min(self.decay, (1 + steps) / (10 + steps)))

    def update(self, skip: Tensor) -> None:
        """Move the average towards the model's weights."""
        # a + share (w - a) is a step of SGD down |a - w|^2 / 2, whose gradient is a ("weight
        # decay") - w ("maximize"): one pass that takes its rate, and `skip`, from tensors
        average, weights = zip(*self._floats, strict=True)
        torch._fused_sgd_(
            average,
            weights,
            [],
            lr=self._share,
            weight_decay=1.0,
            maximize=True,
            momentum=0.0,
            dampening=0.0,
            nesterov=False,
            is_first_step=False,
            found_inf=skip,
        )
        if self._counts:
            torch._foreach_copy_(*zip(*self._counts, strict=True))


class LossScale:
    """Scaling of the loss, so that small float16 gradients do not vanish (Micikevicius et al.
    2018), with the rules and numbers of torch.amp.GradScaler; without `enabled` it only judges.

    It starts at 2^14, halves when a gradient overflows and doubles after 2000 steps without.
    """

    def __init__(self, device: torch.device, enabled: bool):
        self.factor = torch.full((), 2.0**14, device=device) if enabled else None
        self.growth = torch.zeros((), dtype=torch.int32, device=device) if enabled else None

    def scaled(self, loss: Tensor) -> Tensor:
        """What to call backward on."""
        return loss if self.factor is None else loss * self.factor

    def unscale(self, gradients: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Divide the gradients by the scale in place; returns `skip`: 1 where the loss, or with
        scaling a gradient, is not finite."""
        skip = 1.0 - loss.isfinite().float()
        if self.factor is not None:
            inverse = self.factor.reciprocal()
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, skip, inverse)
        return skip

    def update(self, skip: Tensor) -> None:
        """Adapt the scale to what `unscale` found."""
        if self.factor is not None:
            torch._amp_update_scale_(self.factor, self.growth, skip, 2.0, 0.5, 2000)

    def tensors(self) -> list[Tensor]:
        """What a step changes."""
        return [] if self.factor is None else [self.factor, self.growth]
