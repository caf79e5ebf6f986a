"""How a block of the trunk is tried before its plan is chosen: its inputs, its run on a plan, and
what eager PyTorch makes of the same, which says how far off a plan may be.

What a block hands back is already masked and summed for the block before, whoever computes that;
and with pre-activation what it hands on comes with the statistics that the next block's norm asks
for.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import bn_passes, bn_stats
from kernels.activation import REFERENCE
from kernels.bn_checks import Norm
from kernels.conv_dgrad import Before
from kernels.launch import nhwc
from kernels.shapes import conv_out
from models.launches import PLANS, Conv, arrive
from models.trunk import Block, backward_block, backward_preact, forward_block, forward_preact

SLACK = 2e-3  # of a tensor's norm, beside twice eager's error

# N, C, H, W of the input; (K, R, stride, padding) of every convolution, the shortcut's last
Shape = tuple[int, int, int, int]
Geometry = tuple[int, int, int, int]


class Site(NamedTuple):
    """What the choice for a block depends on; the fields as in `trunk.Block`."""

    shape: Shape
    geometry: tuple[Geometry, ...]
    acts: tuple[str | None, ...]
    has_shortcut: bool
    adds: bool
    dtype: torch.dtype
    preact: bool = False


class Draw:
    """Random numbers of a site: the same `number` gives the same."""

    def __init__(self, device: torch.device, number: int):
        self.generator = torch.Generator(device).manual_seed(number)
        self.device = device

    def __call__(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device) * scale

    def channels(self, c: int) -> tuple[Tensor, Tensor]:
        """gamma and beta [C]."""
        return 1 + 0.2 * self(c), 0.2 * self(c)

    def image(self, *size: int, dtype: torch.dtype) -> Tensor:
        """[N, C, H, W] in channels-last order."""
        return nhwc(self(*size).to(dtype))

    def weight(self, k: int, c: int, r: int, dtype: torch.dtype) -> Tensor:
        """[K, C, R, R], as He et al. initialise it."""
        return nhwc(self(k, c, r, r, scale=(2 / (c * r * r)) ** 0.5).to(dtype))


def _weights(site: Site, draw: Draw) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Weight, gamma and beta of every convolution."""
    c, convs = site.shape[1], []
    widths = [c, *(k for k, *_ in site.geometry[:-1])]
    acts: list[str | None] = list(site.acts)
    if site.has_shortcut:
        widths[-1] = c
        acts.append(None if site.preact else "identity")
    for c_in, (k, r, _, _), act in zip(widths, site.geometry, acts, strict=True):
        weight = draw.weight(k, c_in, r, site.dtype)
        norm = (None, None) if act is None else draw.channels(c_in if site.preact else k)
        convs.append((weight, *norm))
    return convs


def output_shape(site: Site) -> Shape:
    """N, K, P, Q of the block's output."""
    n, _, h, w = site.shape
    for _, r, stride, padding in site.geometry[: len(site.acts)]:
        h, w = (conv_out(size, r, stride, padding) for size in (h, w))
    return n, site.geometry[-1][0], h, w


def make_inputs(site: Site, device: torch.device, number: int) -> dict[str, Any]:
    """A block's input as an identity block before it made it, its parameters, and the gradient of
    its output."""
    draw, dtype = Draw(device, number), site.dtype
    convs = _weights(site, draw)
    x, residual = (draw.image(*site.shape, dtype=dtype) for _ in range(2))
    norm = Norm(*draw.channels(site.shape[1]), *bn_stats.statistics(x)[:, 0], 1e-5)
    y, mask = bn_passes.forward(x, norm, residual, None, "relu")
    dy = draw.image(*output_shape(site), dtype=dtype)
    return {"h": y, "before": Before(x, norm, "relu", mask=mask), "convs": convs, "dy": dy}


def make_preact_inputs(site: Site, device: torch.device, number: int) -> dict[str, Any]:
    """A raw sum with its statistics, the block's parameters, and the gradient of its output."""
    draw, dtype = Draw(device, number), site.dtype
    convs, x = _weights(site, draw), draw.image(*site.shape, dtype=dtype)
    dy = draw.image(*output_shape(site), dtype=dtype)
    return {"h": x, "statistics": bn_stats.statistics(x)[:, 0], "convs": convs, "dy": dy}


def _block(name: str, site: Site, inputs: dict[str, Any]) -> Block:
    convs = tuple(
        Conv(*tensors, stride, padding, 1e-5)
        for tensors, (_, _, stride, padding) in zip(inputs["convs"], site.geometry, strict=True)
    )
    shortcut = convs[-1] if site.has_shortcut else None
    chained = convs[: len(site.acts)]
    return Block(PLANS[name], chained, site.acts, shortcut, site.adds, site.preact)


def run(name: str, site: Site, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """One block's forward and backward on plan `name`."""
    block = _block(name, site, inputs)
    y, units = forward_block(block, inputs["h"])
    arriving = arrive(inputs["dy"], units[-1].made)
    handed, parameters = backward_block(block, units, arriving, inputs["before"])
    return named(parameters, y=y, dz=handed.gradient, sums=handed.partials.sum(1))


def run_preact(name: str, site: Site, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The same of a block with pre-activation, and the statistics of what it hands on."""
    block = _block(name, site, inputs)
    y, statistics, units = forward_preact(block, inputs["h"], inputs["statistics"])
    if statistics is None:
        statistics = bn_stats.statistics(y)[:, 0]
    dx, parameters = backward_preact(block, units, inputs["dy"])
    return named(parameters, y=y, statistics=statistics, dx=dx)


def named(gradients: Sequence[Tensor], **outputs: Tensor) -> dict[str, Tensor]:
    """The outputs, and the gradients of the parameters by number."""
    return outputs | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}


class Check:
    """Compares what a candidate gives with eager PyTorch in float32, and allows twice the error of
    eager in the candidate's own type. The truth is computed once, when it is first asked for.

    make_inputs: the inputs that the outputs were made from. eager: (inputs, dtype) -> outputs.
    """

    def __init__(
        self,
        make_inputs: Callable[[], Any],
        eager: Callable[[Any, torch.dtype], dict[str, Tensor]],
        dtype: torch.dtype,
    ):
        self.make_inputs, self.eager, self.dtype = make_inputs, eager, dtype
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
        inputs = self.make_inputs()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            self.truth = self.eager(inputs, torch.float32)
        eager = self.eager(inputs, self.dtype)
        for part, truth in self.truth.items():
            error = (eager[part].float() - truth).norm() / truth.norm().clamp_min(1e-20)
            self.allowed[part] = 2 * error.item() + SLACK


class _Leaves:
    """A site's parameters as leaves in `dtype`, norms in their own, and what is made of them."""

    def __init__(self, site: Site, inputs: dict[str, Any], dtype: torch.dtype):
        self.geometry, self.convs = site.geometry, []
        for weight, *norm in inputs["convs"]:
            tensors = [weight.to(dtype), *(t for t in norm if t is not None)]
            self.convs.append([tensor.detach().requires_grad_() for tensor in tensors])

    def conv(self, h: Tensor, number: int) -> Tensor:
        _, _, stride, padding = self.geometry[number]
        return F.conv2d(h, self.convs[number][0], stride=stride, padding=padding)

    def norm(self, x: Tensor, number: int) -> Tensor:
        return F.batch_norm(x, None, None, *self.convs[number][1:], training=True, eps=1e-5)

    def gradients(self, y: Tensor, h: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [h, *chain.from_iterable(self.convs)], dy.to(y.dtype))


def eager(site: Site, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """What `run` returns, by PyTorch's own modules and autograd."""
    h, leaves = inputs["h"].to(dtype).requires_grad_(), _Leaves(site, inputs, dtype)
    y = h
    for number, act in enumerate(site.acts):
        z = leaves.norm(leaves.conv(y, number), number)
        if number == len(site.acts) - 1 and site.adds:
            last = len(site.acts)
            z = z + (leaves.norm(leaves.conv(h, last), last) if site.has_shortcut else h)
        y = REFERENCE[act](z)
    dh, *gradients = leaves.gradients(y, h, inputs["dy"])
    x, norm, *_ = inputs["before"]
    dz = torch.where(inputs["h"] > 0, dh, 0)
    wide = dz.float()
    mean = norm.mean.view(-1, 1, 1)
    sums = torch.stack((wide.sum((0, 2, 3)), (wide * (x.float() - mean)).sum((0, 2, 3))))
    return named(gradients, y=y.detach(), dz=dz, sums=sums)


def eager_preact(site: Site, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """What `run_preact` returns, likewise."""
    x, leaves = inputs["h"].to(dtype).requires_grad_(), _Leaves(site, inputs, dtype)
    y, shortcut = x, x
    for number, act in enumerate(site.acts):
        h = y if act is None else REFERENCE[act](leaves.norm(y, number))
        if number == 0 and site.has_shortcut:
            shortcut = leaves.conv(h, len(site.acts))
        y = leaves.conv(h, number)
    y = y + shortcut
    dx, *gradients = leaves.gradients(y, x, inputs["dy"])
    var, mean = torch.var_mean(y.detach().float(), (0, 2, 3), correction=0)
    return named(gradients, y=y.detach(), statistics=torch.stack((mean, var)), dx=dx)
