"""Layers of blocks: neighbours that the trunk knows run together as one autograd function, each on
its plan; any other block runs by itself, on the units it is made of."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from kernels.bn_checks import Norm
from models import plans, trunk
from models.units import BatchNormAct, compute_dtype, hooked, takes

UNASKED = "nobody asked for it"


def run_layers(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Layers of blocks one after another: x [N, C, H, W] -> the last block's output.

    Neighbouring blocks that the trunk knows run together as one autograd function; any other block
    runs by itself, on the units it is made of, and so do all where torch.compile traces them.
    """
    if torch.compiler.is_compiling():
        for layer in layers:
            x = layer(x)
        return x
    blocks: list[nn.Module] = []
    for layer in layers:
        opened = type(layer) is nn.Sequential and not hooked(layer)
        blocks += layer if opened else [layer]
    reasons = {block: why_not_trunk(block, x) for block in blocks}
    for reason, group in groupby(blocks, reasons.get):
        if reason is None:
            x = run_trunk(list(group), x)
            continue
        alone = list(group)
        if reason != UNASKED:
            # once for each reason: the same sentence is not shown twice
            warnings.warn(f"{len(alone)} blocks train one by one: {reason}", stacklevel=2)
        for block in alone:
            x = block(x)
    return x


def why_not_trunk(block: nn.Module, x: Tensor) -> str | None:
    """Why `block` cannot be part of the trunk's function in this step, or None if it can; UNASKED
    where nobody asked for the kernels or for a gradient."""
    units = [module for module in block.modules() if isinstance(module, BatchNormAct)]
    if not any(unit.backend == "triton" for unit in units):
        return UNASKED
    if not torch.is_grad_enabled() or x.shape[0] == 0:
        return UNASKED
    if not hasattr(block, "chain"):
        return f"{type(block).__name__} is no known chain of convolutions and norms"
    pairs = pairs_of(block)
    if any(len(pair) != 2 for pair in pairs):
        return "their shortcut is more than a convolution and a norm"
    if not all(norm._uses_batch_statistics() for _, norm in pairs):
        return "a norm has frozen statistics"
    if any(hooked(module) for module in block.modules()):
        return "a hook watches them"
    if not all(takes(conv, x) for conv, _ in pairs):
        return f"the kernels do not take a convolution of theirs, or not in {compute_dtype(x)}"
    if x.dtype != compute_dtype(x):
        return f"additions to an input in {x.dtype} stay in that type"
    return None


def pairs_of(block: nn.Module) -> list[Sequence[nn.Module]]:
    """Convolution and norm of every part of a block, the shortcut's last."""
    return [*block.chain(), *([block.downsample] if block.downsample is not None else [])]


def run_trunk(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    pairs = [pair for block in blocks for pair in pairs_of(block)]
    masters = [conv.weight for conv, _ in pairs]
    with torch.no_grad():
        weights = iter(trunk.cast(masters, [x.dtype] * len(masters)))
    described = _planned(blocks, [describe(block, weights) for block in blocks], x)
    parameters = [
        tensor for conv, norm in pairs for tensor in (conv.weight, norm.weight, norm.bias)
    ]
    y, found, counts = trunk.run(described, x, parameters)
    _track_together([norm for _, norm in pairs], found, counts)
    return y


@torch.no_grad()
def _track_together(units: list[BatchNormAct], found: list[Norm], counts: list[int]) -> None:
    """Move the running statistics of all units, several in a launch."""
    alone = [unit.momentum is None for unit in units]
    for unit, norm, count, lonely in zip(units, found, counts, alone, strict=True):
        if lonely:
            unit._track(norm.mean, norm.var, count)
    for momentum in {unit.momentum for unit in units if unit._tracks} - {None}:
        chosen = [
            (unit, norm, count / (count - 1))
            for unit, norm, count in zip(units, found, counts, strict=True)
            if unit._tracks and unit.momentum == momentum
        ]
        means, variances = ([norm[i] for _, norm, _ in chosen] for i in (2, 3))
        variances = torch._foreach_mul(variances, [unbiased for *_, unbiased in chosen])
        torch._foreach_add_([unit.num_batches_tracked for unit, *_ in chosen], 1)
        torch._foreach_lerp_([unit.running_mean for unit, *_ in chosen], means, momentum)
        torch._foreach_lerp_([unit.running_var for unit, *_ in chosen], variances, momentum)


def _planned(
    blocks: Sequence[nn.Module], described: list[trunk.Block], x: Tensor
) -> list[trunk.Block]:
    """The blocks on their plans: each the one that its `plan` names, or that is found for it with
    the first batch of a size; a smaller last batch does not choose anew."""
    size = "x".join(map(str, x.shape[1:]))
    if not all(size in block.chosen for block in blocks):
        sites, shape = [], tuple(x.shape)
        for block in described:
            site, shape = plans.site_of(block, shape)
            sites.append(site)
        wanted = [block.plan for block in blocks]
        found = wanted
        if not all(name in trunk.PLANS for name in wanted):
            found = plans.choose_plans(sites, x.device, measure="measure" in wanted)
        for block, name, other in zip(blocks, wanted, found, strict=True):
            block.chosen[size] = name if name in trunk.PLANS else other
    return [
        one._replace(plan=trunk.PLANS[block.chosen[size]])
        for one, block in zip(described, blocks, strict=True)
    ]


def describe(block: nn.Module, weights: Iterator[Tensor]) -> trunk.Block:
    convs = tuple(
        trunk.Conv(next(weights), norm.weight, norm.bias, conv.stride[0], conv.padding[0], norm.eps)
        for conv, norm in pairs_of(block)
    )
    acts = tuple(norm.act for _, norm in block.chain())
    shortcut = convs[-1] if block.downsample is not None else None
    plan = trunk.PLANS[plans.BASELINE]
    return trunk.Block(plan, convs[: len(acts)], acts, shortcut, block.adds)


def chosen_plans(model: nn.Module) -> dict[str, dict[str, str]]:
    """The plans that training has settled on: of every block by name, for each CxHxW of the
    trunk's input."""
    blocks = model.named_modules()
    return {name: dict(b.chosen) for name, b in blocks if getattr(b, "chosen", None)}


def restore_plans(model: nn.Module, plans: dict[str, dict[str, str]]) -> None:
    """Settle on what `chosen_plans` returned, so that nothing is chosen anew."""
    for name, chosen in plans.items():
        model.get_submodule(name).chosen.update(chosen)
