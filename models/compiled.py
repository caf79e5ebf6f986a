"""BatchNorm + shortcut + activation for the CPU, as one compiled graph each way.

A convolution on the CPU is best left to oneDNN; what surrounds it is bound by memory traffic. Here
the channels-last tensor is read as [rows, R, C] (a row is one image line of R pixels), and each
direction is two passes over it: one that sums, one that applies. With m = N*H*W values a channel:

    mu, v = mean and biased variance;  inv = rsqrt(v + eps)
    z  = gamma*inv*(x - mu) + beta  [+ residual | + the same affine of a raw residual]
    y  = act(z)
    dz = dy*act'(z)                       z is recomputed: nothing but the inputs is saved
    dbeta = S1 = sum dz;  S2 = sum dz*(x - mu);  dgamma = inv*S2
    dx = gamma*inv*(dz - S1/m - (x - mu)*inv^2*S2/m)

(Ioffe and Szegedy 2015, section 3.) Statistics and arithmetic are float32, y is rounded once.
The graphs have dynamic shapes, so one compilation serves every layer of a network.
"""

import torch
from torch import Tensor

_SIGMOID_GELU = 0.7071067811865476  # 1/sqrt(2)
_NORMAL = 0.3989422804014327  # 1/sqrt(2*pi)


def _act(z: Tensor, act: str) -> Tensor:
    match act:
        case "identity":
            return z
        case "relu":
            return z.clamp_min(0.0)
        case "leaky_relu":
            return torch.where(z > 0, z, 0.01 * z)
        case "silu":
            return z * torch.sigmoid(z)
        case _:
            raise ValueError(act)


def _act_grad(z: Tensor, dy: Tensor, act: str) -> Tensor:
    match act:
        case "identity":
            return dy
        case "relu":
            return torch.where(z > 0, dy, 0.0)
        case "leaky_relu":
            return torch.where(z > 0, dy, 0.01 * dy)
        case "silu":
            p = torch.sigmoid(z)
            return dy * p * (1 + z * (1 - p))
        case _:
            raise ValueError(act)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    first = x[:, 0].float()
    d = x.float() - first[:, None]
    s1, s2 = d.sum(1), (d * d).sum(1)
    rows, r = x.shape[0], x.shape[1]
    mean_b = first + s1 / r
    m2_b = s2 - s1 * s1 / r
    mean = mean_b.sum(0) / rows
    m2 = (m2_b + r * (mean_b - mean).square()).sum(0)
    return mean, m2 / (rows * r)


def _affine(x, weight, bias, mean, var, eps):
    return (x.float() - mean) * (weight * torch.rsqrt(var + eps)) + bias


def _forward(x, weight, bias, eps, residual, act):
    mean, var = _moments(x)
    z = _affine(x, weight, bias, mean, var, eps)
    if residual is not None:
        z = z + residual.float()
    return _act(z, act).to(x.dtype), mean, var


def _backward(dy, x, weight, bias, mean, var, eps, residual, act):
    inv = torch.rsqrt(var + eps)
    z = _affine(x, weight, bias, mean, var, eps)
    if residual is not None:
        z = z + residual.float()
    dz = _act_grad(z, dy.float(), act)
    m = x.shape[0] * x.shape[1]
    s1 = dz.sum(1).sum(0)
    s2 = (dz * (x.float() - mean)).sum(1).sum(0)
    dx = (weight * inv) * (dz - s1 / m - (x.float() - mean) * (inv * inv * s2 / m))
    dres = dz.to(x.dtype) if residual is not None else None
    return dx.to(x.dtype), inv * s2, s1, dres
