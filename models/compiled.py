"""BatchNorm + shortcut + activation on the CPU in four compiled passes; convolutions stay eager.

oneDNN's convolutions are as fast as the machine's matrix product; what stands between them is bound
by memory traffic. Per channel, over m = N*H*W values (Ioffe and Szegedy 2015, section 3):

    sums        mu, v = mean and biased variance of x;  inv = rsqrt(v + eps);  s = gamma*inv
    apply       z = s*(x - mu) + beta  [+ residual | + the same affine map of a raw residual]
                y = act(z)
    grad_sums   dz = dy*act'(z), with z recomputed;  S1 = sum dz;  S2 = sum dz*(x - mu)
                dbeta = S1;  dgamma = inv*S2
    grad_apply  dx = s*dz + B*(x - mu) + C    B = -s*inv^2*S2/m    C = -s*S1/m
                dresidual = dz, or dx's formula with the residual's own constants

Each pass reads its tensors once; nothing but x and the residual is kept for the backward.
Arithmetic and statistics are float32, and y is rounded once.

Inductor gives this away when it sees a whole model, hence the form it gets here: a channels-last
tensor as rows of pixels (see `_rows`), constants per channel computed in a pass of their own, so
that no square root or division is repeated per element, and shapes that are dynamic, so that one
compilation of a pass serves every layer.
"""

import ctypes
import functools
import os
import platform
import shutil
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.activation import REFERENCE

_aten = torch.ops.aten
_ACT_GRAD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda dy, z: dy,
    "relu": lambda dy, z: _aten.threshold_backward(dy, z, 0),
    "leaky_relu": lambda dy, z: _aten.leaky_relu_backward(dy, z, 0.01, False),
    "silu": _aten.silu_backward,
    "gelu": _aten.gelu_backward,
    "mish": _aten.mish_backward,
}
_LANES = 32  # channels a vector step covers: two AVX-512 registers of float32


class _Norm(NamedTuple):
    """Constants of one normalisation, a value per channel: z = scale*(x - mean) + bias."""

    mean: Tensor
    inv: Tensor
    scale: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) * self.scale + self.bias


def _sums(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, biased variance, inv, scale) of x [rows, pixels, *channels].

    Each row is summed about its own first pixel and rows are merged by Chan's formula. The shift is
    a member of the row, so cancellation costs at most a factor `pixels`, wherever the mean lies.
    """
    rows, pixels = x.shape[:2]
    first = x[:, 0].float()
    d = x.float() - first.unsqueeze(1)
    s1, s2 = d.sum(1), (d * d).sum(1)
    row_mean = first + s1 / pixels
    mean = row_mean.sum(0) / rows
    row_m2 = s2 - s1 * s1 / pixels
    m2 = (row_m2 + pixels * (row_mean - mean).square()).sum(0)
    var = m2 / (rows * pixels)
    inv = torch.rsqrt(var + eps)
    return mean, var, inv, weight * inv


def _preactivation(
    x: Tensor, norm: _Norm, residual: Tensor | None, residual_norm: _Norm | None
) -> Tensor:
    z = norm(x)
    if residual_norm is not None:
        return z + residual_norm(residual)
    return z if residual is None else z + residual.float()


def _apply(
    x: Tensor, norm: _Norm, residual: Tensor | None, residual_norm: _Norm | None, act: str
) -> Tensor:
    return REFERENCE[act](_preactivation(x, norm, residual, residual_norm)).to(x.dtype)


def _grad_sums(
    dy: Tensor,
    x: Tensor,
    norm: _Norm,
    residual: Tensor | None,
    residual_norm: _Norm | None,
    act: str,
    training: bool,
) -> tuple[Tensor, ...]:
    """(dbias, dweight, B, C [, the residual's dweight, B, C]); B = C = 0 when not training."""
    z = _preactivation(x, norm, residual, residual_norm)
    dz = _ACT_GRAD[act](dy.float(), z)
    s1 = dz.sum(1).sum(0)
    constants = [s1]
    for tensor, n in ((x, norm), (residual, residual_norm)):
        if n is None:
            continue
        s2 = (dz * (tensor.float() - n.mean)).sum(1).sum(0)
        per_value = n.scale / (x.shape[0] * x.shape[1]) if training else torch.zeros_like(n.scale)
        constants += [n.inv * s2, -per_value * n.inv * n.inv * s2, -per_value * s1]
    return tuple(constants)


def _grad_apply(
    dy: Tensor,
    x: Tensor,
    norm: _Norm,
    residual: Tensor | None,
    residual_norm: _Norm | None,
    act: str,
    constants: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor | None]:
    z = _preactivation(x, norm, residual, residual_norm)
    dz = _ACT_GRAD[act](dy.float(), z)
    b, c, *rest = constants
    dx = (norm.scale * dz + b * (x.float() - norm.mean) + c).to(x.dtype)
    if residual is None:
        return dx, None
    if residual_norm is None:
        return dx, dz.to(residual.dtype)
    b, c = rest
    dr = residual_norm.scale * dz + b * (residual.float() - residual_norm.mean) + c
    return dx, dr.to(residual.dtype)


_PLAIN = SimpleNamespace(sums=_sums, apply=_apply, grad_sums=_grad_sums, grad_apply=_grad_apply)


@functools.cache
def _compiled(threads: int) -> SimpleNamespace:
    """The four passes through Inductor; torch.compile is imported only when it is wanted."""
    import torch._dynamo.config as dynamo

    # one graph for each dtype, activation and kind of residual; above the limit Dynamo raises
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    options = {
        # dz feeds two sums: recompute it for each instead of writing it to memory in float32
        "realize_reads_threshold": 64,
        "realize_opcount_threshold": 1000,
        # trust the processor's flags: compiling and loading a probe for each takes 8 seconds
        "cpp.vec_isa_ok": True,
        # a constant of the code, which without it would come from Inductor's cache on disk as
        # another process, with as many threads as it had, left it there
        "cpp.threads": threads,
    }
    return SimpleNamespace(
        **{
            name: torch.compile(f, dynamic=True, fullgraph=True, options=options)
            for name, f in vars(_PLAIN).items()
        }
    )


def _passes(x: Tensor) -> SimpleNamespace:
    # inside somebody's torch.compile the passes are traced with the rest; sizes of 0 and 1, which
    # Dynamo would compile anew, are not worth a graph
    if torch.compiler.is_compiling() or min(x.shape) < 2:
        return _PLAIN
    return _compiled(torch.get_num_threads())


def _channels(c: int) -> tuple[int, ...]:
    """The shape channels are seen in: whole vectors need no code for a remainder."""
    return (c // _LANES, _LANES) if c % _LANES == 0 and c > _LANES else (c,)


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] of any strides -> [N*H, W, *channels], a view where x is channels-last."""
    n, c, h, w = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    # .data: Dynamo would tie a graph to whether its input requires a gradient and, for a view, to
    # the sizes of its base
    return x.permute(0, 2, 3, 1).view(n * h, w, *_channels(c)).data


def _image(rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_rows`: a channels-last view [N, C, H, W]."""
    n, c, h, w = shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    training: bool,
) -> tuple[_Norm, Tensor | None, Tensor | None]:
    """The constants of a normalisation of x (rows), with the batch's mean and variance."""
    channels = x.shape[2:]
    weight, bias = weight.detach().float().view(channels), bias.detach().float().view(channels)
    if training:
        mean, var, inv, scale = _passes(x).sums(x, weight, eps)
        return _Norm(mean, inv, scale, bias), mean.flatten(), var.flatten()
    inv = torch.rsqrt(running_var.float().view(channels) + eps)
    return _Norm(running_mean.float().view(channels), inv, weight * inv, bias), None, None


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, residual_image, act, training, affine, r_affine, *parameters):
        """affine, r_affine: (running_mean, running_var, eps); parameters: the weights and biases,
        which stand by themselves because they want gradients."""
        x, residual, r_norm = _rows(image), None, None
        norm, mean, var = _norm(x, *parameters[:2], *affine, training)
        r_mean = r_var = None
        if residual_image is not None:
            residual = _rows(residual_image)
        if r_affine is not None:
            r_norm, r_mean, r_var = _norm(residual, *parameters[2:], *r_affine, training)
        y = _passes(x).apply(x, norm, residual, r_norm, act)
        ctx.save_for_backward(image, residual_image, *norm, *(r_norm or ()))
        ctx.act, ctx.training = act, training
        ctx.set_materialize_grads(False)
        statistics = (mean, var, r_mean, r_var)
        ctx.mark_non_differentiable(*(s for s in statistics if s is not None))
        return _image(y, image.shape), *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        image, residual, *norms = ctx.saved_tensors
        norm, r_norm = _Norm(*norms[:4]), _Norm(*norms[4:]) if norms[4:] else None
        x, dy = _rows(image), _rows(dy)
        residual = None if residual is None else _rows(residual)
        passes, site = _passes(x), (x, norm, residual, r_norm, ctx.act)
        s1, dweight, b, c, *r = passes.grad_sums(dy, *site, ctx.training)
        dx, dresidual = passes.grad_apply(dy, *site, (b, c, *r[1:]))
        dbias = s1.flatten()
        r_gradients = (r[0].flatten(), dbias) if r else ()
        return (
            _image(dx, image.shape),
            None if dresidual is None else _image(dresidual, image.shape),
            *(None,) * 4,
            dweight.flatten(),
            dbias,
            *r_gradients,
        )


def bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    residual_norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None, float] | None = None,
    act: str = "relu",
    training: bool = True,
    eps: float = 1e-5,
) -> tuple[Tensor | None, ...]:
    """act(batch_norm(x) + residual), differentiable in x, weight, bias and the residual's tensors.

    x, residual: [N, C, H, W], float32 or bfloat16; channels-last is read as it lies, other layouts
        are copied first. weight, bias, running_mean, running_var: [C].
    residual_norm: (weight, bias, running_mean, running_var, eps) when `residual` is the raw output
        of a shortcut convolution whose own BatchNorm is to be applied on the way.
    act: identity, relu, leaky_relu, silu, gelu or mish.
    training: normalise with the batch's statistics; otherwise with the running ones, as constants.

    Returns (y, mean, var) with y [N, C, H, W] channels-last in x's dtype and the batch's mean and
    biased variance, float32 [C], not differentiable; None when not training. With `residual_norm`
    the residual's mean and variance follow. Running statistics are the caller's to update.
    """
    affine, r_affine = (running_mean, running_var, eps), None
    parameters = [weight, bias]
    if residual_norm is not None:
        parameters += residual_norm[:2]
        r_affine = residual_norm[2:]
    y, *statistics = _BatchNormAct.apply(x, residual, act, training, affine, r_affine, *parameters)
    return y, *(statistics if residual_norm is not None else statistics[:2])


def why_not_compile() -> str | None:
    """The reason torch.compile cannot run on this CPU in one phrase, or None.

    Asks what Inductor asks (its `cpp_compiler_search`) without importing it, which takes seconds.
    """
    if sys.version_info >= (3, 15):
        return f"torch.compile does not support Python {platform.python_version()} yet"
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", default)
    if shutil.which(compiler) is None:
        return f"no C++ compiler found ('{compiler}'; install one or set CXX)"
    return None


def tune_allocator() -> None:
    """Let glibc keep the memory of freed tensors instead of returning it to the system.

    Every step frees and allocates the same large buffers, and a fresh page costs more than a pass
    over it. The memory in use at the peak stays with the process. Does nothing without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    max_fast, trim_threshold, top_pad, mmap_threshold = 1, -1, -2, -3  # names in malloc.h
    mallopt(mmap_threshold, 2**31 - 1)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)
    mallopt(max_fast, 0)  # small freed chunks would keep the holes of large tensors from merging
