"""Which plan a convolution runs on where it is not part of the trunk: in inference, each with the
norm, addition and activation after it, and in the stem. Remembered, shipped, measured and checked
as the blocks' plans are (`plans`).

    inference        P3: one kernel. P1: the library's convolution and our pass
    stem inference   P1+statistics: our convolution. P1: the library's; both with our pooling pass
    stem training    the same, each with our pass backward and the library's weight gradient; and
                     P3, our convolution and our weight gradient
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import bn_passes, stem_pool
from kernels.activation import REFERENCE
from kernels.bn_checks import Norm
from kernels.choices import key_for
from kernels.conv_bn_act import forward as in_one_kernel
from kernels.select import Job
from kernels.shapes import conv_out
from models import launches, plans
from models.launches import PLANS, Conv, Plan
from models.trials import Check, Draw, Geometry, Shape, named

# What is taken where nothing is measured is also what the others have to beat by more than the
# spread. The stem is ours: at batch 256 on an H100 its forward took cuDNN 1.8 ms and ours 0.55 ms.
# So is inference: the kernels took 20 us an image there with statistics, a heavier epilogue, where
# cuDNN with our passes took 24.8 (docs/notes.md).
CANDIDATES = {
    "inference": ("P3", "P1"),
    "stem inference": ("P1+statistics", "P1"),
    "stem training": ("P1+statistics", "P3", "P1"),
}
SOURCES = (Path(__file__).resolve(), *plans.SOURCES)
EPS = 1e-5


class Site(NamedTuple):
    """What the choice depends on; `use` is one of CANDIDATES, the shape that of the input."""

    use: str
    shape: Shape
    geometry: Geometry
    act: str
    has_residual: bool
    dtype: torch.dtype


def settled(
    use: str,
    conv: nn.Conv2d,
    norm: nn.Module,
    x: Tensor,
    dtype: torch.dtype,
    act: str,
    has_residual: bool,
) -> Plan:
    """The plan for `use` of conv(x), computed in `dtype`, `norm` and `act` after it: the one that
    `norm.plan` names, or that is found for it with the largest batch of a size; a smaller last
    batch does not choose anew."""
    default = norm.plan if norm.plan in PLANS else CANDIDATES[use][0]
    if torch.compiler.is_compiling() or len(x) == 0:
        return PLANS[default]
    key = f"{use} {plans.settled_key(x.shape, dtype, x.device)}"
    if len(x) > norm.chosen.get(key, (0,))[0]:
        name = default
        if norm.plan not in PLANS:
            geometry = (conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.padding[0])
            site = Site(use, tuple(x.shape), geometry, act, has_residual, dtype)
            job = job_for(site, x.device)
            (name,) = plans.winners([job], x.device, measure=norm.plan == "measure")
        norm.chosen[key] = (len(x), name)
    return PLANS[norm.chosen[key][1]]


def job_for(site: Site, device: torch.device) -> Job:
    """The candidates for one site, checked against eager PyTorch in float32."""
    k, r, stride, _ = site.geometry
    added = "+residual" if site.has_residual else ""
    shape = "x".join(map(str, site.shape))
    what = f"{site.use} {shape} {k}x{r}x{r}/{stride} {site.act}{added}"
    run = _infer if site.use == "inference" else _stem
    make_inputs = partial(_make_inputs, site, device)
    return Job(
        key=key_for(what, site.dtype, device, SOURCES),
        candidates={name: partial(run, PLANS[name], site) for name in CANDIDATES[site.use]},
        baseline=CANDIDATES[site.use][0],
        make_inputs=make_inputs,
        check=Check(partial(make_inputs, 0), partial(_eager, site), site.dtype),
    )


def _make_inputs(site: Site, device: torch.device, number: int) -> dict[str, Any]:
    """The input, weight, a norm with running statistics, the residual, and for training the
    gradient of the pooled output."""
    draw, (k, r, stride, padding) = Draw(device, number), site.geometry
    (n, c, h, w), dtype = site.shape, site.dtype
    p, q = (conv_out(size, r, stride, padding) for size in (h, w))
    inputs = {
        "x": draw.image(n, c, h, w, dtype=dtype),
        "weight": draw.weight(k, c, r, dtype),
        "norm": Norm(*draw.channels(k), 0.3 * draw(k), 1 + draw(k) ** 2, EPS),
        "residual": draw.image(n, k, p, q, dtype=dtype) if site.has_residual else None,
    }
    if site.use == "stem training":
        inputs["dy"] = draw.image(n, k, (p + 1) // 2, (q + 1) // 2, dtype=dtype)
    return inputs


def _conv(site: Site, inputs: dict[str, Any]) -> Conv:
    _, _, stride, padding = site.geometry
    return Conv(inputs["weight"], *inputs["norm"][:2], stride, padding, EPS)


def _infer(plan: Plan, site: Site, inputs: dict[str, Any]) -> dict[str, Tensor]:
    h, norm, residual, conv = inputs["x"], inputs["norm"], inputs["residual"], _conv(site, inputs)
    if plan.forward:
        steps = (conv.stride, conv.padding)
        return {"y": in_one_kernel(h, conv.weight, norm, residual, *steps, site.act)}
    x, _ = launches.convolve(plan, h, conv)
    return {"y": bn_passes.forward(x, norm, residual, None, site.act)[0]}


def _stem(plan: Plan, site: Site, inputs: dict[str, Any]) -> dict[str, Tensor]:
    conv, training = _conv(site, inputs), site.use == "stem training"
    x, statistics = launches.convolve(plan, inputs["x"], conv)
    norm = launches.norm_of(x, conv, statistics) if training else inputs["norm"]
    y, x_max, index = stem_pool.forward(x, norm, site.act, save=training)
    if not training:
        return {"y": y}
    dx, dnorm = stem_pool.backward(inputs["dy"], x, x_max, index, norm, site.act, True)
    return named([launches.grad_weight(plan, dx, inputs["x"], conv), *dnorm], y=y)


def _eager(site: Site, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    _, _, stride, padding = site.geometry
    gamma, beta, mean, var, _ = inputs["norm"]
    leaves = [inputs["weight"].to(dtype), gamma, beta]
    training = site.use == "stem training"
    if training:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    x = F.conv2d(inputs["x"].to(dtype), leaves[0], stride=stride, padding=padding)
    running = (None, None) if training else (mean, var)
    y = F.batch_norm(x, *running, *leaves[1:], training, eps=EPS)
    if site.has_residual:
        y = y + inputs["residual"].to(dtype)
    y = REFERENCE[site.act](y)
    if site.use != "inference":
        y = F.max_pool2d(y, 3, 2, 1)
    gradients = torch.autograd.grad(y, leaves, inputs["dy"].to(y.dtype)) if training else ()
    return named(gradients, y=y.detach())
