"""`fuse`: a torchvision or timm ResNet on our units, with the tensors and the state_dict it has.

Only what is known to the letter is touched: the classes named in `BLOCKS` and `NETWORKS`, by exact
type, with nothing between a BatchNorm and its activation. A module that is fused keeps its object
and changes its class: its parameters, buffers, hooks, mode and every reference to it stay.
"""

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models.backend import resolve_backend
from models.layers import run_layers
from models.units import (
    BatchNormAct,
    TrunkBlock,
    check_plan,
    conv_norm_act,
    hooked,
    linear,
    set_backend,
    stem,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels take


class FusedBasicBlock(TrunkBlock):
    """torchvision's and timm's BasicBlock on our units; only ever made by `fuse`."""

    adds = True

    def chain(self) -> tuple[tuple[nn.Conv2d, BatchNormAct], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        h = conv_norm_act(self.conv1, self.bn1, x)
        return conv_norm_act(self.conv2, self.bn2, h, x, self.downsample)


class FusedBottleneck(TrunkBlock):
    """torchvision's and timm's Bottleneck on our units; only ever made by `fuse`."""

    adds = True

    def chain(self) -> tuple[tuple[nn.Conv2d, BatchNormAct], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)

    def forward(self, x: Tensor) -> Tensor:
        h = conv_norm_act(self.conv1, self.bn1, x)
        h = conv_norm_act(self.conv2, self.bn2, h)
        return conv_norm_act(self.conv3, self.bn3, h, x, self.downsample)


FUSED = (FusedBasicBlock, FusedBottleneck)


def _forward_impl(network: nn.Module, x: Tensor) -> Tensor:
    """torchvision's method of this name, its stem on our units."""
    x = stem(network.conv1, network.bn1, network.maxpool, x)
    return linear(network.fc, network.avgpool(_layers(network, x)).flatten(1))


def forward_features(network: nn.Module, x: Tensor) -> Tensor:
    """timm's method of this name, its stem on our units."""
    if network.grad_checkpointing:
        return type(network).forward_features(network, x)
    return _layers(network, stem(network.conv1, network.bn1, network.maxpool, x))


def _layers(network: nn.Module, x: Tensor) -> Tensor:
    return run_layers((network.layer1, network.layer2, network.layer3, network.layer4), x)


@dataclass(frozen=True)
class Block:
    """How a known block class is fused: its new class, the attribute that holds the activation
    after bn1, bn2 ..., and attributes that must be absent (None or Identity)."""

    fused: type[nn.Module]
    acts: tuple[str, ...]
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Network:
    """How the stem of a known network is fused: the attribute that holds its activation, and the
    function that stands in for the method of the same name."""

    act: str
    method: Callable[[nn.Module, Tensor], Tensor]


_EXTRAS = ("drop_block", "aa", "se", "drop_path")
# By name, so that neither library need be installed.
BLOCKS = {
    "torchvision.models.resnet.BasicBlock": Block(FusedBasicBlock, ("relu", "relu")),
    "torchvision.models.resnet.Bottleneck": Block(FusedBottleneck, ("relu", "relu", "relu")),
    "timm.models.resnet.BasicBlock": Block(FusedBasicBlock, ("act1", "act2"), _EXTRAS),
    "timm.models.resnet.Bottleneck": Block(FusedBottleneck, ("act1", "act2", "act3"), _EXTRAS),
}
NETWORKS = {
    "torchvision.models.resnet.ResNet": Network("relu", _forward_impl),
    "timm.models.resnet.ResNet": Network("act1", forward_features),
}


@dataclass(frozen=True)
class Place:
    """A part of a model that holds BatchNorms: `name` in the model, what it is, and whether it is
    `fused`, `ready` for `fuse`, or `left` alone; `text` says what runs fused, or why it is left."""

    name: str
    kind: str
    status: str
    text: str


@dataclass(frozen=True)
class FuseReport:
    """What of a model is fused and what is not, and why; `print` it."""

    places: tuple[Place, ...]
    backend: str | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        fused = sum(place.status == "fused" for place in self.places)
        runs = f", running on {self.backend}" if self.backend else ""
        lines = [f"{fused} of {len(self.places)} parts fused{runs}"]
        groups: dict[tuple[str, str, str], list[str]] = {}
        for place in self.places:
            groups.setdefault((place.status, place.kind, place.text), []).append(place.name)
        for (status, kind, text), names in groups.items():
            count = f"{len(names)} x " if len(names) > 1 else ""
            more = f" and {len(names) - 12} more" if len(names) > 12 else ""
            listed = " ".join(names[:12]) + more
            lines.append(f"  {status:5}  {count}{kind}: {text}")
            lines += [f"         {row}" for row in textwrap.wrap(listed, 84)]
        return "\n".join(lines + [f"  note   {note}" for note in self.notes])


def fuse(model: nn.Module, backend: str = "auto", plan: str = "known") -> nn.Module:
    """Put the known parts of `model` on our units, in place, and return the same object.

    model: any network with torchvision or timm ResNet blocks (BasicBlock, Bottleneck: ResNet,
        Wide ResNet, ResNeXt), alone or inside another module. `fuse_report` tells what was known.
    backend: auto, eager, compile or triton, as `models.resolve_backend` takes it.
    plan: known, measure or a name, as `models.set_backend` takes it.

    Parameters and buffers are the same tensors under the same state_dict keys, so optimisers,
    checkpoints and an exponential average of the weights go on as before. Fused activations become
    nn.Identity. Hooks of blocks and convolutions stay; a part with a hook on a BatchNorm or an
    activation is left alone, because the value it watches is no longer made. Fusing again changes
    nothing but the backend and the plan. In training a second backward through one forward is
    refused, and nn.DataParallel would run the first replica everywhere: use
    DistributedDataParallel. SyncBatchNorm.convert_sync_batchnorm and its like go before fusing:
    after it they would put norms without activations in place of ours.

    Raises BackendUnavailable when compile or triton is demanded and cannot run; ValueError for
    another backend or plan. The model is then unchanged.
    """
    check_plan(plan)
    if backend not in ("auto", "eager", "compile", "triton"):
        raise ValueError(f"unknown backend {backend!r}: choose auto, eager, compile or triton")
    chosen = resolve_backend(backend, _device(model))
    for place in list(_places(model)):
        if place.status == "ready":
            owner = model.get_submodule(place.name)
            (_fuse_stem if _type_name(owner) in NETWORKS else _fuse_block)(owner)
    if _units(model):
        set_backend(model, chosen.name, plan)
    return model


def fuse_report(model: nn.Module) -> FuseReport:
    """What `fuse` has fused in `model`, would fuse, and leaves alone, and why."""
    places = tuple(_places(model))
    units = _units(model)
    notes = []
    if not places:
        notes.append("nothing to fuse: no torchvision or timm ResNet block, no BatchNorm2d")
    if units and any(c.groups > 1 for c in model.modules() if isinstance(c, nn.Conv2d)):
        notes.append("grouped convolutions stay the library's, their BatchNorm is fused")
    backend = " and ".join(sorted({unit.backend for unit in units})) or None
    auto = resolve_backend("auto", _device(model))
    if units and backend == auto.name != "triton":
        notes.append(auto.reason)
    if backend in ("compile", "triton") and not _channels_last(model):
        notes.append(
            "the kernels work in channels-last: model.to(memory_format=torch.channels_last) "
            "saves a copy at every layer"
        )
    return FuseReport(places, backend, tuple(notes))


def _units(model: nn.Module) -> list[BatchNormAct]:
    return [module for module in model.modules() if isinstance(module, BatchNormAct)]


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _channels_last(model: nn.Module) -> bool:
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    return all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def _type_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _places(model: nn.Module) -> Iterator[Place]:
    covered: list[str] = []  # names of the modules whose BatchNorms are accounted for
    for name, module in model.named_modules():
        kind = type(module).__name__
        if _type_name(module) in NETWORKS:
            covered += [f"{name}.{part}".lstrip(".") for part in ("conv1", "bn1", "maxpool")]
            fused = isinstance(module.bn1, BatchNormAct)
            reason = None if fused else _why_not_stem(module)
            yield Place(name, "stem", _status(fused, reason), reason or _stem_work(module))
        elif isinstance(module, FUSED) or _known_ancestor(module):
            covered.append(name)
            fused = isinstance(module, FUSED)
            reason = None if fused else _why_not_block(module)
            yield Place(name, kind, _status(fused, reason), reason or _block_work(module))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not _within(name, covered):
            fused = isinstance(module, BatchNormAct)
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            text = "a unit already" if fused else f"its place in {owner} is not a known one"
            yield Place(name, kind, "fused" if fused else "left", text)


def _status(fused: bool, reason: str | None) -> str:
    return "fused" if fused else "left" if reason else "ready"


def _within(name: str, covered: list[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in covered)


def _known_ancestor(module: nn.Module) -> str | None:
    """The name in `BLOCKS` of the module's class or of a class it derives from."""
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((name for name in names if name in BLOCKS), None)


def _why_not_block(block: nn.Module) -> str | None:
    known = _known_ancestor(block)
    pattern = BLOCKS[known]
    if _type_name(block) != known:
        return f"a subclass of {known}"
    if "forward" in vars(block):
        return "its forward has been replaced"
    for name in pattern.absent:
        part = getattr(block, name, None)
        if part is not None and type(part) is not nn.Identity:
            return f"{name} is {type(part).__name__}, which is not fused"
    for number, act in enumerate(pattern.acts, start=1):
        reason = _why_not_pair(block, f"bn{number}", act)
        if reason:
            return reason
    downsample = block.downsample
    if downsample is None:
        return None
    if type(downsample) is not nn.Sequential or not len(downsample):
        return f"downsample is {type(downsample).__name__}, not Sequential"
    if hooked(downsample):
        return "downsample has a hook"
    return _why_not_norm("the last of downsample", downsample[-1])


def _why_not_stem(network: nn.Module) -> str | None:
    if "forward" in vars(network):
        return "its forward has been replaced"
    reasons = (_why_not_pair(network, norm, act) for norm, act in _stem_pairs(network))
    return next((reason for reason in reasons if reason), None)


def _stem_pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Names of the stem's BatchNorms and of the activation after each; timm's deep stems have them
    in the Sequential `conv1`, its strided ones in the Sequential `maxpool` as well."""
    pairs = [("bn1", NETWORKS[_type_name(network)].act)]
    for name in ("conv1", "maxpool"):
        chain = getattr(network, name)
        if type(chain) is nn.Sequential:
            norms = (i for i, m in enumerate(chain[:-1]) if isinstance(m, nn.BatchNorm2d))
            pairs += [(f"{name}.{i}", f"{name}.{i + 1}") for i in norms]
    return pairs


def _why_not_pair(owner: nn.Module, norm: str, act: str) -> str | None:
    found = owner.get_submodule(act)
    if _act_of(found) is None:
        return f"{act} is {found}, which no kernel computes"
    if hooked(found):
        return f"{act} has a hook"
    return _why_not_norm(norm, owner.get_submodule(norm))


def _why_not_norm(name: str, norm: nn.Module) -> str | None:
    if type(norm) is not nn.BatchNorm2d:
        return f"{name} is {type(norm).__name__}, not BatchNorm2d"
    if norm.weight is None:
        return f"{name} has no weight and bias"
    if norm.weight.dtype not in DTYPES:
        return f"{name} is {norm.weight.dtype}, the kernels take float32, bfloat16 and float16"
    return f"{name} has a hook" if hooked(norm) else None


def _act_of(module: nn.Module) -> str | None:
    """The name our units have for an activation module, or None."""
    if type(module) is nn.LeakyReLU:
        return "leaky_relu" if module.negative_slope == 0.01 else None
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else None
    names = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Mish: "mish", nn.Identity: "identity"}
    return names.get(type(module))


def _block_work(block: nn.Module) -> str:
    """The passes of a block, fused or ready, in words."""
    numbers = range(1, 4 if hasattr(block, "bn3") else 3)
    if isinstance(block, FUSED):
        acts = [getattr(block, f"bn{number}").act for number in numbers]
    else:
        acts = [_act_of(getattr(block, name)) for name in BLOCKS[_type_name(block)].acts]
    *inner, last = acts
    passes = [f"conv-bn-{act}" for act in inner] + [f"conv-bn-add-{last}"]
    return ", ".join(passes) + (", the shortcut's bn with it" if block.downsample else "")


def _stem_work(network: nn.Module) -> str:
    norm, pool = network.bn1, network.maxpool
    fused = isinstance(norm, BatchNormAct)
    act = norm.act if fused else _act_of(getattr(network, NETWORKS[_type_name(network)].act))
    pooled = type(pool) is nn.MaxPool2d
    return f"conv-bn-{act}" + (
        "-maxpool" if pooled else f"; maxpool, a {type(pool).__name__}, stays"
    )


def _become_unit(norm: nn.BatchNorm2d, act: str) -> None:
    norm.__class__ = BatchNormAct
    norm.act, norm.backend, norm.plan, norm.chosen = act, "eager", "known", {}


def _fuse_block(block: nn.Module) -> None:
    pattern = BLOCKS[_type_name(block)]
    acts = [_act_of(getattr(block, name)) for name in pattern.acts]  # torchvision's are one module
    for number, (name, act) in enumerate(zip(pattern.acts, acts, strict=True), start=1):
        _become_unit(getattr(block, f"bn{number}"), act)
        setattr(block, name, nn.Identity())
    if block.downsample is not None:
        _become_unit(block.downsample[-1], "identity")
    block.__class__ = pattern.fused


def _fuse_stem(network: nn.Module) -> None:
    for norm, act in _stem_pairs(network):
        _become_unit(network.get_submodule(norm), _act_of(network.get_submodule(act)))
        network.set_submodule(act, nn.Identity())
    method = NETWORKS[_type_name(network)].method
    setattr(network, method.__name__, partial(method, network))
