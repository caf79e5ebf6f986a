"""Layers of blocks: neighbours that the trunk knows run together as one autograd function, each on
its plan; any other block runs by itself, on the units it is made of."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from kernels.bn_checks import Norm
from kernels.launch import runs_triton
from models import plans, trunk
from models.mods import GroupNormAct
from models.units import BatchNormAct, TrunkBlock, compute_dtype, hooked, takes
from models.weight_copies import in_type
from profiling import nvtx

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
    kinds, wanted = {}, x.requires_grad
    for block in blocks:
        wanted = wanted or any(p.requires_grad for p in block.parameters())
        reason = why_not_trunk(block, x) if wanted else UNASKED
        kinds[block] = (reason, reason is None and block.preact)
    for (reason, _), group in groupby(blocks, kinds.get):
        if reason is None:
            x = run_trunk(list(group), x)
            continue
        alone = list(group)
        if reason != UNASKED:
            # once for each reason: the same sentence is not shown twice
            warnings.warn(f"{len(alone)} blocks train one by one: {reason}", stacklevel=2)
        for block in alone:
            x = nvtx.through(block, nvtx.name_of(block), x)
    return x


def why_not_trunk(block: nn.Module, x: Tensor) -> str | None:
    """Why `block` cannot be part of the trunk's function in this step, or None if it can; UNASKED
    where nobody asked for the kernels or for a gradient."""
    units = [m for m in block.modules() if isinstance(m, BatchNormAct | GroupNormAct)]
    if not any(unit.backend == "triton" for unit in units):
        return UNASKED
    if not torch.is_grad_enabled() or x.shape[0] == 0:
        return UNASKED
    if not isinstance(block, TrunkBlock):
        return f"{type(block).__name__} is no known chain of convolutions and norms"
    if _replaced(block):
        return "their forward is not the one that their chain describes"
    if any(isinstance(unit, GroupNormAct) for unit in units):
        return "their norms are no BatchNorms"
    if block.beyond():
        return f"the trunk has no launches for {', '.join(block.beyond())}"
    if not runs_triton(x):
        return f"the kernels do not run on {x.device}"
    if block.downsample is not None and len(block.downsample) != (1 if block.preact else 2):
        return "their shortcut is more than a convolution" + ("" if block.preact else " and a norm")
    pairs = pairs_of(block)
    norms = [norm for _, norm in pairs if norm is not None]
    if not all(norm._uses_batch_statistics() for norm in norms):
        return "a norm has frozen statistics"
    if any(norm.weight is None for norm in norms):
        return "a norm has no weight and bias"
    if any(b.dtype != torch.float32 for norm in norms for b in norm.buffers() if b.ndim):
        return "their running statistics are not in float32"
    if any(hooked(module) for module in block.modules()):
        return "a hook watches them"
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return "what they save is watched (checkpointing, offloading)"
    if not all(takes(conv, x) for conv, _ in pairs):
        return f"the kernels do not take a convolution of theirs, or not in {compute_dtype(x)}"
    if x.dtype != compute_dtype(x):
        return f"additions to an input in {x.dtype} stay in that type"
    return None


def _replaced(block: TrunkBlock) -> bool:
    owner = next(cls for cls in type(block).__mro__ if "chain" in vars(cls))
    return "forward" in vars(block) or type(block).forward is not owner.forward


def pairs_of(block: TrunkBlock) -> list[tuple[nn.Conv2d, BatchNormAct | None]]:
    """Convolution and norm, if there is one, of every part of a block, the shortcut's last."""
    if block.downsample is None:
        return list(block.chain())
    conv, *norms = block.downsample
    return [*block.chain(), (conv, *norms) if norms else (conv, None)]


def run_trunk(blocks: Sequence[TrunkBlock], x: Tensor) -> Tensor:
    """The blocks as one autograd function: x [N, C, H, W] in the type they compute in -> the last
    block's output. Moves the running statistics. Raises ValueError as `trunk.run` does."""
    pairs = [pair for block in blocks for pair in pairs_of(block)]
    weights = iter(in_type([conv.weight for conv, _ in pairs], x.dtype))
    described = _planned(blocks, [describe(block, weights) for block in blocks], x)
    parameters = []
    for conv, norm in pairs:
        parameters += [conv.weight] if norm is None else [conv.weight, norm.weight, norm.bias]
    y, found, counts = trunk.run(described, x, parameters)
    _track_together([norm for _, norm in pairs if norm is not None], found, counts)
    return y


@torch.no_grad()
def _track_together(units: list[BatchNormAct], found: list[Norm], counts: list[int]) -> None:
    """Move the running statistics of all units, several in a launch."""
    if len(set(units)) < len(units) or any(unit.momentum is None for unit in units):
        # several in a launch come in no order, and take their weight from the host
        for unit, norm, count in zip(units, found, counts, strict=True):
            unit._track(norm.mean, norm.var, count)
        return
    for momentum in {unit.momentum for unit in units if unit._tracks}:
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
    the largest batch of a size; a smaller last batch does not choose anew."""
    n, key = len(x), plans.settled_key(x.shape, x.dtype, x.device)
    if not all(n <= block.chosen.get(key, (0,))[0] for block in blocks):
        sites, shape = [], tuple(x.shape)
        for block in described:
            site, shape = plans.site_of(block, shape)
            sites.append(site)
        wanted = [block.plan for block in blocks]
        found = wanted
        if not all(name in trunk.PLANS for name in wanted):
            found = plans.choose_plans(sites, x.device, measure="measure" in wanted)
        for block, name, other in zip(blocks, wanted, found, strict=True):
            block.chosen[key] = (n, name if name in trunk.PLANS else other)
    return [
        one._replace(plan=trunk.PLANS[block.chosen[key][1]])
        for one, block in zip(described, blocks, strict=True)
    ]


def describe(block: TrunkBlock, weights: Iterator[Tensor]) -> trunk.Block:
    """The block as the trunk sees it, with the next of the `weights` for each convolution, on the
    baseline's plan."""
    convs = []
    for conv, norm in pairs_of(block):
        affine = (None, None) if norm is None else (norm.weight, norm.bias)
        eps = 0.0 if norm is None else norm.eps
        convs.append(trunk.Conv(next(weights), *affine, conv.stride[0], conv.padding[0], eps))
    acts = tuple(None if norm is None else norm.act for _, norm in block.chain())
    chained = tuple(convs[: len(acts)])
    shortcut = convs[-1] if block.downsample is not None else None
    plan = trunk.PLANS[plans.BASELINE]
    name = nvtx.name_of(block)
    return trunk.Block(plan, chained, acts, shortcut, block.adds, block.preact, name)


Chosen = dict[str, dict[str, tuple[int, str]]]


def chosen_plans(model: nn.Module) -> Chosen:
    """The plans that have been settled on: of every block, and of every norm beside a convolution
    that runs by itself, by name; for each size and type of the input and each GPU the largest batch
    and the plan."""
    kinds = TrunkBlock | BatchNormAct
    parts = ((name, part) for name, part in model.named_modules() if isinstance(part, kinds))
    return {name: dict(part.chosen) for name, part in parts if getattr(part, "chosen", None)}


def restore_plans(model: nn.Module, plans: Chosen) -> None:
    """Settle on what `chosen_plans` returned, so that nothing is chosen anew."""
    for name, chosen in plans.items():
        model.get_submodule(name).chosen.update(chosen)
