"""Which plan each block of the trunk runs on: measured on the GPU at hand, remembered, and checked
for the very shapes before it counts. Where nothing is known it is the baseline.

Measuring compiles every candidate for every distinct block, minutes on a first run: it is done
where it is asked for (`set_backend(model, "triton", plan="measure")`, or a run long enough).

A block is measured alone, forward and backward together, as it stands between its neighbours: what
it hands back is already masked and summed for the block before, whoever computes that.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import bn_passes, bn_stats
from kernels.activation import REFERENCE
from kernels.bn_checks import Norm
from kernels.choices import key_for
from kernels.conv_dgrad import Before
from kernels.launch import nhwc
from kernels.select import Job, choose
from kernels.shapes import conv_out
from models.trunk import PLANS, Block, Conv, arrive, backward_block, forward_block

BASELINE = "P1"
SLACK = 2e-3  # of a tensor's norm, beside twice eager's error
SOURCES = (Path(__file__).resolve(), Path(__file__).resolve().with_name("trunk.py"))

# N, C, H, W of the input; (K, R, stride, padding) of every convolution, the shortcut's last
Shape = tuple[int, int, int, int]
Geometry = tuple[int, int, int, int]
Site = tuple[Shape, tuple[Geometry, ...], tuple[str, ...], bool, bool, torch.dtype]


def site_of(block: Block, shape: Shape) -> tuple[Site, Shape]:
    """What the choice for a block depends on, and the shape of the block's output."""
    convs = [*block.convs, *([block.shortcut] if block.shortcut is not None else [])]
    geometry = tuple(
        (conv.weight.shape[0], conv.weight.shape[2], conv.stride, conv.padding) for conv in convs
    )
    n, _, h, w = shape
    for _, r, stride, padding in geometry[: len(block.convs)]:
        h, w = (conv_out(size, r, stride, padding) for size in (h, w))
    dtype, has_shortcut = convs[0].weight.dtype, block.shortcut is not None
    site = (shape, geometry, block.acts, has_shortcut, block.adds, dtype)
    return site, (n, block.convs[-1].weight.shape[0], h, w)


def choose_plans(sites: Sequence[Site], device: torch.device, measure: bool) -> list[str]:
    """The name of the plan of every site on `device`: remembered or shipped, or, where `measure`
    asks for it, measured; else the baseline. With PyTorch's deterministic algorithms only what is
    shipped counts."""
    if device.type != "cuda":
        return [BASELINE] * len(sites)
    jobs = {site: job_for(site, device) for site in sites}
    with torch.autocast(device.type, enabled=False):
        choices = choose(
            list(jobs.values()),
            measure=measure,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    winners = {site: choice.winner for site, choice in zip(jobs, choices, strict=True)}
    return [winners[site] for site in sites]


def job_for(site: Site, device: torch.device) -> Job:
    """The candidates for one site: every plan, checked against the block in float32."""
    shape, geometry, acts, has_shortcut, adds, dtype = site
    kind = "shortcut" if has_shortcut else "identity" if adds else "plain"
    taps = " ".join(f"{k}x{r}x{r}/{stride}" for k, r, stride, _ in geometry)
    what = f"{kind} block {'x'.join(map(str, shape))} {taps} {' '.join(acts)}"
    return Job(
        key=key_for(what, dtype, device, SOURCES),
        candidates={name: partial(_run, name, site) for name in PLANS},
        baseline=BASELINE,
        make_inputs=partial(_make_inputs, site, device),
        check=_Check(site, device),
    )


def _make_inputs(site: Site, device: torch.device, number: int) -> dict[str, Any]:
    """A block's input as an identity block before it made it, its parameters, and the gradient of
    its output."""
    shape, geometry, _, has_shortcut, _, dtype = site
    generator = torch.Generator(device).manual_seed(number)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=device) * scale

    def channels(c: int) -> tuple[Tensor, Tensor]:
        return 1 + 0.2 * draw(c), 0.2 * draw(c)

    (n, c, h, w), convs = shape, []
    widths = [c, *(k for k, *_ in geometry[:-1])]
    if has_shortcut:
        widths[-1] = c
    for c_in, (k, r, _, _) in zip(widths, geometry, strict=True):
        weight = draw(k, c_in, r, r, scale=(2 / (c_in * r * r)) ** 0.5)
        convs.append((nhwc(weight.to(dtype)), *channels(k)))
    x, residual = (nhwc(draw(n, c, h, w).to(dtype)) for _ in range(2))
    mean, var = bn_stats.statistics(x)[:, 0]
    norm = Norm(*channels(c), mean, var, 1e-5)
    y, mask = bn_passes.forward(x, norm, residual, None, "relu")
    for _, r, stride, padding in geometry[: len(geometry) - has_shortcut]:
        h, w = (conv_out(size, r, stride, padding) for size in (h, w))
    k = geometry[-1][0]
    dy = nhwc(draw(n, k, h, w).to(dtype))
    return {"h": y, "before": Before(x, norm, "relu", mask=mask), "convs": convs, "dy": dy}


def _run(name: str, site: Site, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """One block's forward and backward on plan `name`."""
    _, geometry, acts, has_shortcut, adds, _ = site
    convs = tuple(
        Conv(*tensors, stride, padding, 1e-5)
        for tensors, (_, _, stride, padding) in zip(inputs["convs"], geometry, strict=True)
    )
    shortcut = convs[-1] if has_shortcut else None
    block = Block(PLANS[name], convs[: len(acts)], acts, shortcut, adds)
    y, units = forward_block(block, inputs["h"])
    arriving = arrive(inputs["dy"], units[-1].made)
    handed, parameters = backward_block(block, units, arriving, inputs["before"])
    found = {"y": y, "dz": handed.gradient, "sums": handed.partials.sum(1)}
    return found | {f"gradient {i}": gradient for i, gradient in enumerate(parameters)}


class _Check:
    """Compares what a plan gives with the block in float32, and allows twice the error of eager
    PyTorch in the plan's own type. The truth is computed once, when it is first asked for."""

    def __init__(self, site: Site, device: torch.device):
        self.site, self.device = site, device
        self.truth: dict[str, Tensor] = {}
        self.allowed: dict[str, float] = {}

    def __call__(self, name: str, outputs: dict[str, Tensor]) -> str | None:
        if not self.truth:
            self._prepare()
        for part, truth in self.truth.items():
            found = outputs[part].float()
            away = ((found - truth).norm() / truth.norm().clamp_min(1e-20)).item()
            if not away <= self.allowed[part]:  # NaN is not
                return f"{part} is off by {away:.2g} of its norm, allowed {self.allowed[part]:.2g}"
        return None

    def _prepare(self) -> None:
        inputs = _make_inputs(self.site, self.device, 0)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            self.truth = _eager(self.site, inputs, torch.float32)
        eager = _eager(self.site, inputs, self.site[-1])
        for part, truth in self.truth.items():
            error = (eager[part].float() - truth).norm() / truth.norm().clamp_min(1e-20)
            self.allowed[part] = 2 * error.item() + SLACK


def _eager(site: Site, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """What `_run` returns, by PyTorch's own modules and autograd."""
    _, geometry, acts, has_shortcut, adds, _ = site
    h = inputs["h"].to(dtype).requires_grad_()
    leaves = []

    def unit(h: Tensor, number: int) -> Tensor:
        (weight, gamma, beta), (_, _, stride, padding) = inputs["convs"][number], geometry[number]
        tensors = [weight.detach().to(dtype), gamma.detach(), beta.detach()]
        leaves.append((number, [tensor.requires_grad_() for tensor in tensors]))
        x = F.conv2d(h, tensors[0], stride=stride, padding=padding)
        return F.batch_norm(x, None, None, *tensors[1:], training=True, eps=1e-5)

    y = h
    for number, act in enumerate(acts):
        z = unit(y, number)
        if number == len(acts) - 1 and adds:
            z = z + (unit(h, len(acts)) if has_shortcut else h)
        y = REFERENCE[act](z)
    ordered = [
        tensor for _, tensors in sorted(leaves, key=lambda one: one[0]) for tensor in tensors
    ]
    dh, *gradients = torch.autograd.grad(y, [h, *ordered], inputs["dy"].to(dtype))
    x, norm, *_ = inputs["before"]
    dz = torch.where(inputs["h"] > 0, dh, 0)
    wide = dz.float()
    mean = norm.mean.view(-1, 1, 1)
    sums = torch.stack((wide.sum((0, 2, 3)), (wide * (x.float() - mean)).sum((0, 2, 3))))
    found = {"y": y.detach(), "dz": dz, "sums": sums}
    return found | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}
