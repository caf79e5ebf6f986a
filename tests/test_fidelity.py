"""What people run says what the trained network says: folded, in bfloat16, and as ONNX, over 100
photos."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from models import build_model, folded
from models.units import BatchNormAct
from train import export
from train.config import DEFAULT
from train.data import load_images, open_photos
from train.data.loader import normalisation_table, normalise

FOOD5 = Path(__file__).resolve().parents[2] / "shared" / "data" / "food5"
COUNT = 100
BATCH = 25


def some_photos(data: str, size: int, cache: Path) -> Tensor:
    """COUNT photos as a network takes them, float32 [COUNT, 3, size, size]."""
    images, photos = load_images(open_photos(data), size, cache_dir=cache, progress=False)
    chosen = images[:: len(photos) // COUNT][:COUNT]
    table = normalisation_table(torch.float32)
    return normalise(chosen, table, torch.float32).permute(0, 3, 1, 2)


def settled(name: str, images: Tensor) -> nn.Module:
    """A network whose norms know the photos, and whose logits tell them apart."""
    torch.manual_seed(0)
    model = build_model(name, 5)
    for norm in model.modules():
        if isinstance(norm, BatchNormAct):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            norm.momentum = None  # the plain mean over the batches
    with torch.no_grad():
        for batch in images.split(BATCH):
            model.train()(batch)
        model.eval()
        logits = over(model, images)
        scale = 2 / logits.std(0).float()
        model.fc.weight.mul_(scale[:, None])
        model.fc.bias.copy_(-scale * logits.mean(0).float())
    return model


@torch.inference_mode()
def over(model, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(BATCH)]).double()


def apart(logits: Tensor, others: Tensor) -> float:
    """The largest difference of probabilities."""
    return (logits.double().softmax(1) - others.softmax(1)).abs().max().item()


def check(name: str, images: Tensor, tmp_path: Path) -> None:
    """What is folded or exported may be twice as far from float64 as eager is in its precision."""
    model, size = settled(name, images), images.shape[-1]
    truth = over(copy.deepcopy(model).double(), images.double())
    assert np.unique(truth.argmax(1)).size > 1
    allowed = 2 * apart(over(model, images), truth) + 1e-6
    assert apart(over(folded(model, size), images), truth) < allowed < 1e-4

    config = replace(DEFAULT, data=replace(DEFAULT.data, image_size=size, val_scale=1.0))
    export.export_onnx(export.Source(model, config, tuple("abcde"), 1.0), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    program = [session.run(None, {"images": b.numpy()})[0] for b in images.split(BATCH)]
    assert apart(torch.from_numpy(np.concatenate(program)), truth) < allowed

    with torch.autocast("cpu", torch.bfloat16):
        allowed = 2 * apart(over(model, images), truth) + 1e-3
    narrow = folded(model, size).to(torch.bfloat16, memory_format=torch.channels_last)
    assert apart(over(narrow, images.bfloat16()), truth) < allowed < 0.5


def test_drawn_dishes(tmp_path):
    check("resnet18", some_photos("synthetic", 64, tmp_path), tmp_path)


@pytest.mark.skipif(not FOOD5.is_dir(), reason="the photos are not here")
def test_photos(tmp_path):
    check("resnet34", some_photos(str(FOOD5), 128, tmp_path), tmp_path)
