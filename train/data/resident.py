"""Batches made on the GPU from pictures that stay there: no thread prepares and no bus carries any.

A photo's view depends on (seed, epoch, row) as the CPU's does, from the same random numbers; it is
rounded once instead of twice or three times on the way (`kernels.image_prep`).
"""

from collections.abc import Iterator
from dataclasses import astuple
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import kernels
from train.data.augment import AUGMENTS, HEAVY, MEAN, STD, STRENGTHS
from train.data.loader import Batch, BatchOrder

KERNEL_AUGMENTS = tuple(kind for kind in AUGMENTS if kind != HEAVY)
SLAB = 1024  # pictures uploaded at a time: a set on disk is never in memory as a whole


class Views(NamedTuple):
    """A batch that the training step makes itself, by `ResidentLoader.make`, on its device: int64
    [2, B] the photos' rows and the numbers that decide their views, and int64 [] the epoch."""

    numbers: Tensor
    epoch: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """What the training step takes."""
        return self

    @property
    def indices(self) -> Tensor:
        """int64 [B], the rows."""
        return self.numbers[0]


class ResidentLoader(BatchOrder):
    """What `Loader` gives for the same arguments, from pixels on the device.

    pixels: uint8 [N, store, store, 3], contiguous; the batches are where they are.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: np.ndarray,
        indices: np.ndarray,
        *,
        batch_size: int,
        image_size: int,
        augment: str = "none",
        seed: int = 0,
        shuffle: bool = False,
        balance: np.ndarray | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
    ):
        if augment not in KERNEL_AUGMENTS:
            raise ValueError(f"the kernel knows no augmentation {augment}")
        super().__init__(
            indices, batch_size=batch_size, shuffle=shuffle, seed=seed, balance=balance
        )
        self.pixels = pixels
        self.labels = torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(pixels.device)
        self.channels_last = channels_last
        self._view = {
            "seed": seed,
            "size": image_size,
            "strength": None if augment == "none" else astuple(STRENGTHS[augment]),
            "mean": MEAN,
            "std": STD,
            "dtype": dtype,
        }

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from number `start` on."""
        rows = self.rows(epoch)
        numbers = self._there(self.view_numbers(rows))
        rows = numbers if self.balance is None else self._there(rows)
        number = torch.full((), epoch, dtype=torch.int64, device=self.pixels.device)
        for first, last in self.bounds[start:]:
            yield self._prepare(rows[first:last], numbers[first:last], number)

    def batch(self, rows: np.ndarray, numbers: np.ndarray, epoch: int) -> Batch:
        """The batch of these rows, whose `numbers` decide their views."""
        number = torch.full((), epoch, dtype=torch.int64, device=self.pixels.device)
        return self._prepare(self._there(rows), self._there(numbers), number)

    def views(self, epoch: int, start: int = 0) -> Iterator[Views]:
        """What `make` makes the batches of one epoch of, from number `start` on."""
        rows = self.rows(epoch)
        views = self._there(np.stack([rows, self.view_numbers(rows)]))
        number = torch.full((), epoch, dtype=torch.int64, device=self.pixels.device)
        for first, last in self.bounds[start:]:
            yield Views(views[:, first:last], number)

    def make(self, views: Tensor, epoch: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S] and labels int64 [B] of one of `views`."""
        images, labels, _ = self._prepare(*views, epoch)
        return images, labels

    def _prepare(self, rows: Tensor, numbers: Tensor, epoch: Tensor) -> Batch:
        images = kernels.image_prep(self.pixels, numbers, epoch, rows=rows, **self._view)
        if not self.channels_last:
            images = images.contiguous()
        return Batch(images, self.labels[rows], rows)

    def _there(self, values: np.ndarray) -> Tensor:
        """int64 on the device; from memory that is not pinned, a copy would wait."""
        tensor = torch.from_numpy(values)
        if self.pixels.is_cuda:
            tensor = tensor.pin_memory().to(self.pixels.device, non_blocking=True)
        return tensor


class ViewLoader:
    """The batches of a `ResidentLoader` as the numbers that it makes them of: for a training step
    that does so itself, so that a CUDA graph holds that too."""

    def __init__(self, loader: ResidentLoader):
        self.make = loader.make
        self.epoch = loader.views
        self._batches = len(loader)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._batches


def upload(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 pictures, also those of a memory-mapped file, on the device."""
    pixels = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for first in range(0, len(images), SLAB):
        slab = slice(first, first + SLAB)
        pixels[slab] = torch.from_numpy(np.array(images[slab]))
    return pixels
