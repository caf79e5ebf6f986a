"""The probe: what the weights of a training do to a few fixed images, layer by layer.

It works on a copy of the network that runs eagerly, whatever runs the training: hooks see nothing
of compiled, captured or fused steps. Weights and running statistics are copied into it, so that the
training's own are never touched; random states are put back.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import set_backend, synchronise
from train import distributed
from train.config import OptimConfig
from train.data.loader import Batch
from train.training import Training

IMAGES = 64  # for accuracy and dead channels
GRADIENT_IMAGES = 16  # of them for gradients: a backward pass costs twice a forward pass, and more
# frequent probes see more than exact ones
SMALL_BATCH = 8  # images that BatchNorm sees together; up to here its statistics are worth judging

NORMS = (nn.modules.batchnorm._BatchNorm,)
LAYERS = (nn.Conv2d, nn.Linear)
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.ELU)


def norm_images(config: OptimConfig) -> int:
    """How many training images BatchNorm sees together: those of a part of the batch, on one
    process, or with --sync-bn on all of them."""
    processes = 1 if config.sync_bn else distributed.size()
    return max(1, config.batch_size // (config.accumulate * processes))


class Probe:
    """Measures `training` on the images of `batch`, at most IMAGES, where the network is."""

    def __init__(self, training: Training, batch: Batch):
        self.training = training
        self.batch = batch
        # of several processes one probes, and nobody would answer its norms
        self.copy = synchronise(set_backend(copy.deepcopy(training.model), "eager"), False)
        self.layers: list[str] = []  # with weights, in the order in which they run
        self.shapes: dict[str, tuple[list[int], list[int]]] = {}
        self.norm_positions: dict[str, int] = {}  # of each norm's map
        self._seen: dict[str, dict[str, Tensor]] = {}
        for name, module in self.copy.named_modules():
            if isinstance(module, LAYERS):
                module.register_forward_hook(self._hook(name, _layer))
            if isinstance(module, NORMS):
                module.register_forward_pre_hook(self._norm_hook(name))
            if _activates(module):
                module.register_forward_hook(self._hook(name, _activation))
        self._parameters = dict(self.copy.named_parameters())
        self._moved = dict.fromkeys(self._parameters, 0)  # the step that last changed each
        self.step = 0  # of the weights in the copy

    def _hook(self, name: str, measure: Callable[[Tensor], dict[str, Tensor]]) -> Callable:
        def hook(module, inputs, output):
            if isinstance(module, LAYERS) and name not in self.shapes:
                self.layers.append(name)
                self.shapes[name] = (list(inputs[0].shape[1:]), list(output.shape[1:]))
            self._seen.setdefault(name, {}).update(measure(output.detach()))

        return hook

    def _norm_hook(self, name: str) -> Callable:
        def hook(module, inputs):
            if module.training and module.running_mean is not None:
                self.norm_positions[name] = inputs[0][0, 0].numel()
                self._seen.setdefault(name, {}).update(_distance(module, inputs[0].detach()))

        return hook

    def measure(self, step: int) -> dict[str, Any]:
        """A probe record of the weights behind `step` updates, without the update itself, which
        `update` adds one step later. Lists have an entry for each layer, or each unit.

        clean_loss, clean_accuracy, confidence: of the weights that are evaluated, in eval mode,
            on `images` images; confidence is the probability of each image's own label
        batch_accuracy: of the same weights with the batch's own statistics, for small batches
        loss, grad_norm: in training mode, on GRADIENT_IMAGES; null when it is not finite
        layers: weight and gradient norms, variance of the filters over their mean square, standard
            deviation of the output
        units: of activations, the share of channels that are 0 on all images and positions and
            the share of zeros; of norms, the distance of the batch's mean from the running one in
            running standard deviations, and the log of their ratio
        no_gradient: parameters that no gradient reaches; still: steps since a parameter changed
        """
        devices = [self.training.device] if self.training.on_cuda else []
        with torch.random.fork_rng(devices):  # dropout draws
            still = self._still(step)
            self._load(self.training.weights())
            clean = self._clean()
            self._load(self.training.model.state_dict())
            gradients = self._gradients()
        self.step = step
        scale = self.training.step.scale.factor
        return {
            "kind": "probe",
            "step": step,
            **clean,
            **gradients,
            "scale": None if scale is None else scale.item(),
            "still": still,
        }

    def update(self, step: int) -> list[float] | None:
        """The norm of a step's change of each layer's weights, relative to the weights; None
        before another step was made."""
        if step <= self.step:
            return None
        model = dict(self.training.model.named_parameters())
        names = [f"{name}.weight" for name in self.layers]
        with torch.no_grad():
            new = [model[name].detach() for name in names]
            old = [self._parameters[name].detach() for name in names]
            moved = torch.stack(torch._foreach_norm(torch._foreach_sub(new, old)))
            sizes = torch.stack(torch._foreach_norm(old)).clamp(min=1e-12)
        return (moved / sizes / (step - self.step)).tolist()

    @torch.no_grad()
    def _load(self, values: Mapping[str, Tensor]) -> None:
        own = self.copy.state_dict()
        torch._foreach_copy_(list(own.values()), [values[name] for name in own])

    def _still(self, step: int) -> dict[str, int]:
        new = [p.detach() for p in self.training.model.parameters()]
        old = [p.detach() for p in self._parameters.values()]
        moved = torch.stack(torch._foreach_norm(torch._foreach_sub(new, old), float("inf"))) != 0
        for name, changed in zip(self._moved, moved.tolist(), strict=True):
            if changed:
                self._moved[name] = step
        return {name: step - last for name, last in self._moved.items() if step > last}

    @torch.no_grad()
    def _clean(self) -> dict[str, Any]:
        images, labels, _ = self.batch
        self._seen = {}
        with self.training.autocast():
            logits = self.copy.eval()(images).float()
        self._eval_seen = self._seen
        own = logits.softmax(1).gather(1, labels[:, None]).flatten()
        found = {
            "images": len(labels),
            "clean_loss": F.cross_entropy(logits, labels).item(),
            "clean_accuracy": (logits.argmax(1) == labels).float().mean().item(),
            "confidence": [round(p, 4) for p in own.tolist()],
        }
        if norm_images(self.training.config) <= SMALL_BATCH:
            with self.training.autocast():
                other = self.copy.train()(images).argmax(1) == labels
            right = logits.argmax(1) == labels
            found["batch_accuracy"] = other.float().mean().item()
            found["disagree"] = int((other != right).sum())
        return found

    def _gradients(self) -> dict[str, Any]:
        images, labels = (tensor[:GRADIENT_IMAGES] for tensor in self.batch[:2])
        self._seen = {}
        with self.training.autocast():
            logits = self.copy.train()(images)
        loss = F.cross_entropy(logits.float(), labels)
        names = [name for name, p in self._parameters.items() if p.requires_grad]
        wanted = [self._parameters[name] for name in names]
        scale = self.training.step.scale
        found = torch.autograd.grad(scale.scaled(loss), wanted, allow_unused=True)
        gradients = {n: g for n, g in zip(names, found, strict=True) if g is not None}
        factor = 1.0 if scale.factor is None else scale.factor.item()
        norms = torch.stack(torch._foreach_norm(list(gradients.values()))).float() / factor
        by_name = dict(zip(gradients, norms.tolist(), strict=True))
        return {
            "loss": loss.item(),
            "grad_norm": norms.norm().item(),
            "layers": {
                "gradient": [by_name.get(f"{name}.weight", 0.0) for name in self.layers],
                **self._weights(),
            },
            "units": self._units(),
            "no_gradient": [name for name in names if name not in gradients],
        }

    @torch.no_grad()
    def _weights(self) -> dict[str, list[float]]:
        weights = [self._parameters[f"{name}.weight"].detach().float() for name in self.layers]
        filters = [w.flatten(1) for w in weights]
        squares = torch.stack([f.square().mean() for f in filters])
        spread = torch.stack([f.var(0, correction=0).mean() for f in filters])
        return {
            "weight": torch.stack(torch._foreach_norm(weights)).tolist(),
            "filter_variance": (spread / squares.clamp(min=1e-30)).tolist(),
            "output": torch.stack([self._seen[name]["std"] for name in self.layers]).tolist(),
        }

    def _units(self) -> dict[str, dict[str, float]]:
        units = {}
        for name, seen in self._seen.items():
            unit = {key: seen[key].item() for key in ("shift", "spread", "zero") if key in seen}
            if "highest" in seen:
                highest = torch.maximum(seen["highest"], self._eval_seen[name]["highest"])
                unit["dead"] = (highest == 0).float().mean().item()
                unit["channels"] = highest.numel()
            if unit:
                units[name] = unit
        return units


def _activates(module: nn.Module) -> bool:
    """Whether the module's output is that of an activation: one of PyTorch's, or a norm of ours."""
    act = getattr(module, "act", "identity")
    return isinstance(module, ACTIVATIONS) or (isinstance(act, str) and act != "identity")


def _layer(output: Tensor) -> dict[str, Tensor]:
    return {"std": output.float().std(correction=0)}


def _activation(output: Tensor) -> dict[str, Tensor]:
    others = [d for d in range(output.ndim) if d != 1]
    return {
        "highest": output.abs().amax(others).float(),
        "zero": (output == 0).float().mean(),
    }


def _distance(norm: nn.Module, x: Tensor) -> dict[str, Tensor]:
    variance, mean = torch.var_mean(x.float(), [d for d in range(x.ndim) if d != 1])
    deviation = (norm.running_var + norm.eps).sqrt()
    return {
        "shift": ((mean - norm.running_mean).abs() / deviation).median(),
        "spread": ((variance + norm.eps) / (norm.running_var + norm.eps)).log().median(),
    }
