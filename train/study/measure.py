"""What a study wants to know of a finished run beyond its summary, measured once and left in its
folder: `measures.json`, and `pictures/` with `pictures.json`.
"""

import hashlib
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import build_model
from train import checkpoint
from train.config import Config, DataConfig, from_dict
from train.data.loader import Loader
from train.environment import choose_device
from train.files import unwritable, write_atomically
from train.inputs import Inputs, load_inputs
from train.predictor import Trained, network, weights_file
from train.quality import surest_mistakes, with_evidence
from train.record import write_json
from train.study.results import CHECKED
from train.validation import Validation, read_validation, validation_square

FIXED_IMAGES = 32  # training images on which gradients and blocks are measured
MISTAKES = 6  # of a run, kept as pictures


def measure(folder: Path, peak_memory: int | None) -> None:
    """Measure the finished run in `folder`; measures.json, written last, says that all is there.

    peak_memory: bytes, as its training needed, None where that is not known. Raises LapisError.
    """
    path = weights_file(folder)
    state = checkpoint.load(path)
    config, classes = from_dict(state["config"], path), tuple(state["classes"])
    device = choose_device(config.run.device)
    inputs = load_inputs(_with_own_split(config, folder))
    model = network(config, len(classes), state["weights"], path)
    model = model.to(device, memory_format=torch.channels_last)
    values: dict[str, Any] = {
        "checkpoint": path.name,
        "flops": count_flops(model, config.data.evaluated_size, device),
        "peak_memory_bytes": peak_memory,
        "fixed_images": min(FIXED_IMAGES, len(inputs.split.train)),
        "depth": measure_depth(folder, config, len(classes), inputs, device),
    }
    validation = read_validation(folder)
    if validation is not None:
        trained = Trained(classes, config, 1.0, model, torch.float32, device, model)
        _write_pictures(folder, trained, inputs, validation)
    listed = [folder / name for name in CHECKED]
    values["files"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in listed if path.exists()
    }
    write_json(folder / "measures.json", values)


def _with_own_split(config: Config, folder: Path) -> Config:
    """The configuration that finds the run's photos as they were divided then, by its split.csv."""
    plain = DataConfig()
    data = replace(
        config.data,
        split=str(folder / "split.csv"),
        fold=None,
        folds=None,
        val_fraction=plain.val_fraction,
        accept_leak=True,
    )
    return replace(config, data=data, run=replace(config.run, resume=folder))


def _write_pictures(folder: Path, trained: Trained, inputs: Inputs, validation: Validation) -> None:
    """The surest mistakes, each picture once, and of each class the photo that was known best,
    beside the class activation map of the class that was named."""
    probability, labels, classes = validation.probability, validation.labels, validation.classes
    named, sure = probability.argmax(axis=1), probability.max(axis=1)
    mistakes = surest_mistakes(probability, labels, validation.pictures)
    kept = [("mistake", i) for i in islice(mistakes, MISTAKES)]
    surest = np.argsort(-sure, kind="stable")
    right = surest[validation.right[surest]]
    _, firsts = np.unique(labels[right], return_index=True)
    kept += [("known", i) for i in right[firsts]]
    try:
        (folder / "pictures").mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(folder / "pictures", error) from error
    listed = []
    for number, (kind, i) in enumerate(kept, start=1):
        name = f"pictures/{number:02d}.jpg"
        square = validation_square(inputs, trained.config.data, i)
        write_atomically(folder / name, with_evidence(trained, square, int(named[i])))
        listed.append(
            {
                "picture": name,
                "kind": kind,
                "file": validation.files[i],
                "label": classes[labels[i]],
                "named": classes[named[i]],
                "probability": sure[i],
            }
        )
    write_json(folder / "pictures.json", listed)


def count_flops(model: nn.Module, image_size: int, device: torch.device) -> int:
    """Floating-point operations of one image forward: convolutions and matrix products, a
    multiply-add counts two."""
    image = torch.zeros(1, 3, image_size, image_size, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops()


def measure_depth(
    folder: Path, config: Config, num_classes: int, inputs: Inputs, device: torch.device
) -> list[dict[str, Any]]:
    """For the weights at the start, in the best and in the last epoch: epoch, loss, and a mapping a
    block as `block_measures` gives it, on the same training images every time."""
    chosen = np.linspace(0, len(inputs.split.train) - 1, FIXED_IMAGES).astype(int)
    loader = Loader(
        inputs.images,
        inputs.photos.labels,
        inputs.split.train[np.unique(chosen)],
        batch_size=FIXED_IMAGES,
        image_size=config.data.image_size,
        dtype=torch.float32,
        device=device,
    )
    batch = next(iter(loader.epoch(0)))
    torch.manual_seed(config.run.seed)  # as train.run does: the weights the run began with
    options = dict(vars(config.model))
    found = {0: build_model(options.pop("model"), num_classes, **options)}
    for name in ("best.pt", "last.pt"):
        path = folder / "checkpoints" / name
        if path.is_file():
            state = checkpoint.load(path)
            found[len(state["history"])] = network(config, num_classes, state["model"], path)
    measures = []
    for epoch, model in sorted(found.items()):
        loss, blocks = block_measures(model.to(device), batch.images, batch.labels)
        measures.append({"epoch": epoch, "loss": loss, "blocks": blocks})
    return measures


def block_measures(
    model: nn.Module, images: Tensor, labels: Tensor
) -> tuple[float, list[dict[str, Any]]]:
    """The loss, and for the stem and each block, from first to last: name, gradient_norm, the norm
    of the loss's gradient in its 3x3 convolutions, and identity_distance, the mean over images of
    |block(x) - x| / |x|, None where the block changes the shape.

    In training mode and float32. images [N, 3, H, W], labels int64 [N].
    """
    blocks = {"conv1": model.conv1}
    for stage in range(1, 5):
        for index, block in enumerate(getattr(model, f"layer{stage}")):
            blocks[f"layer{stage}.{index}"] = block
    distances: dict[str, float] = {}

    def watch(name: str):
        def look(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x, y = inputs[0].detach().flatten(1), output.detach().flatten(1)
            if x.shape == y.shape and name != "conv1":
                ratio = (y - x).norm(dim=1) / x.norm(dim=1).clamp(min=1e-12)
                distances[name] = ratio.mean().item()

        return look

    hooks = [block.register_forward_hook(watch(name)) for name, block in blocks.items()]
    try:
        loss = F.cross_entropy(model.train()(images).float(), labels)
    finally:
        for hook in hooks:
            hook.remove()
    model.zero_grad()
    loss.backward()
    measures = []
    for name, block in blocks.items():
        convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
        gradients = [m.weight.grad.norm() for m in convolutions if m.kernel_size != (1, 1)]
        measures.append(
            {
                "name": name,
                "gradient_norm": torch.stack(gradients).norm().item(),
                "identity_distance": distances.get(name),
            }
        )
    return loss.item(), measures
