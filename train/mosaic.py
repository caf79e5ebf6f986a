"""`batch.png` of a run folder: its first training batch as the network sees it."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from train.data.augment import MEAN, STD
from train.data.loader import Batch, Loader
from train.data.resident import ResidentLoader
from train.files import write_atomically
from train.plots import INK, SOFT
from train.step import mix
from train.training import Training

COLUMNS, ROWS = 8, 4
TILE, GAP, LINE = 128, 6, 15  # pixels
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def first_batch(
    loader: Loader | ResidentLoader, training: Training
) -> tuple[Batch, Batch | None, float]:
    """What the first step of a run sees of its first images, at most COLUMNS * ROWS: the batch
    after augmentation and mixing, those mixed into it, and the share that each image keeps. Of
    several processes' shares it is the first one's."""
    rows = loader.rows(1)
    numbers = loader.view_numbers(rows)
    _, size = loader.shares[0]
    shown = np.arange(min(size, COLUMNS * ROWS))
    batch = loader.batch(rows[shown], numbers[shown], 1)
    mixing = training.mixing(size, 1, 1)
    if not mixing:
        return batch, None, 1.0
    partner, share, box = (*mixing, None)[:3]
    partner = partner[: len(shown)].cpu().numpy()
    others = loader.batch(rows[partner], numbers[partner], 1)
    images, share = mix(batch.images, others.images, share, box)
    return batch._replace(images=images), others, share.item()


def draw_batch(
    batch: Batch, others: Batch | None, share: float, classes: Sequence[str], path: Path
) -> None:
    """Draw what `first_batch` returns, each picture over its class, or its two classes with their
    shares. Raises `DiskError` when `path` is unwritable."""
    lines = 1 if others is None else 2
    columns = min(COLUMNS, len(batch.labels))
    rows = -(-len(batch.labels) // columns)
    step_x, step_y = TILE + GAP, TILE + GAP + lines * LINE
    picture = Image.new("RGB", (GAP + columns * step_x, GAP + rows * step_y), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.truetype(FONT, 11)
    own = batch.labels.tolist()
    mixed_in = own if others is None else others.labels.tolist()
    for i, pixels in enumerate(_levels(batch.images)):
        x, y = GAP + i % columns * step_x, GAP + i // columns * step_y
        tile = Image.fromarray(pixels)
        smaller = tile.width > TILE
        scaling = Image.Resampling.BOX if smaller else Image.Resampling.NEAREST
        picture.paste(tile.resize((TILE, TILE), scaling), (x, y))
        if own[i] == mixed_in[i] or share > 0.995:
            names = [(classes[own[i]], "", INK)]
        else:
            names = [
                (classes[own[i]], f" {share:.0%}", INK),
                (classes[mixed_in[i]], f" {1 - share:.0%}", SOFT),
            ]
        for line, (name, ending, ink) in enumerate(names):
            text = _fitting(name, ending, font)
            pen.text((x, y + TILE + 1 + line * LINE), text, ink, font)
    # Pillow's encoder takes three times as long
    _, png = cv2.imencode(".png", cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR))
    write_atomically(path, png.tobytes())


def _levels(images: torch.Tensor) -> np.ndarray:
    """Normalised [B, 3, S, S] as uint8 [B, S, S, 3]."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
    levels = 255 * (images.float().cpu() * std + mean)
    return levels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def _fitting(name: str, ending: str, font: ImageFont.FreeTypeFont) -> str:
    """`name` on one line, cut so that it fits a tile with its ending."""
    name = " ".join(name.split())
    if font.getlength(name + ending) <= TILE:
        return name + ending
    while name and font.getlength(f"{name}\u2026{ending}") > TILE:
        name = name[:-1]
    return f"{name}\u2026{ending}"
