"""Batches made on the GPU from pictures that stay there: no thread prepares and no bus carries any.

A photo's view depends on (seed, epoch, row) as the CPU's does, from the same random numbers; it is
rounded once instead of twice or three times on the way (`kernels.image_prep`).
"""

from collections.abc import Iterator, Sequence
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
    [2, B] the photos' rows and the numbers that decide their views, and int64 [] the epoch; indices
    as those of a `Batch`."""

    numbers: Tensor
    epoch: Tensor
    indices: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """What the training step takes."""
        return self.numbers, self.epoch

    @property
    def share(self) -> int:
        """How many of the images are this process's."""
        return self.numbers.shape[1]


class ResidentLoader(BatchOrder):
    """What `Loader` gives for the same arguments, from pixels on the device.

    pixels: uint8 [N, store, store, 3]; the batches are where they are.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: np.ndarray,
        indices: np.ndarray,
        *,
        batch_size: int,
        image_size: int | Sequence[int],
        augment: str = "none",
        seed: int = 0,
        shuffle: bool = False,
        balance: np.ndarray | None = None,
        part: int = 0,
        parts: int = 1,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
    ):
        if augment not in KERNEL_AUGMENTS:
            raise ValueError(f"the kernel knows no augmentation {augment}")
        super().__init__(
            indices,
            batch_size=batch_size,
            image_size=image_size,
            shuffle=shuffle,
            seed=seed,
            balance=balance,
            part=part,
            parts=parts,
        )
        self.pixels = pixels.contiguous()
        self.labels = torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(pixels.device)
        self.channels_last = channels_last
        self._size = self.size_at(1)  # of the epoch under way
        self._view = {
            "seed": seed,
            "strength": None if augment == "none" else astuple(STRENGTHS[augment]),
            "mean": MEAN,
            "std": STD,
            "dtype": dtype,
        }

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from number `start` on."""
        self._size = self.size_at(epoch)
        rows = self.rows(epoch)
        numbers = self._there(self.view_numbers(rows))
        rows = numbers if self.balance is None else self._there(rows)
        number = torch.full((), epoch, dtype=torch.int64, device=self.pixels.device)
        for (first, last), (a, b) in zip(self.bounds[start:], self.shares[start:], strict=True):
            batch = self._prepare(rows[a:b], numbers[a:b], number)
            yield batch._replace(indices=rows[first:last])

    def batch(self, rows: np.ndarray, numbers: np.ndarray, epoch: int) -> Batch:
        """The batch of these rows, whose `numbers` decide their views."""
        self._size = self.size_at(epoch)
        number = torch.full((), epoch, dtype=torch.int64, device=self.pixels.device)
        return self._prepare(self._there(rows), self._there(numbers), number)

    def views(self, epoch: int, start: int = 0) -> Iterator[Views]:
        """What `make` makes the batches of one epoch of, from number `start` on."""
        self._size = self.size_at(epoch)
        rows = self.rows(epoch)
        views = self._there(np.stack([rows, self.view_numbers(rows)]))
        number = torch.full((), epoch, dtype=torch.int64, device=self.pixels.device)
        for (first, last), (a, b) in zip(self.bounds[start:], self.shares[start:], strict=True):
            yield Views(views[:, a:b], number, views[0, first:last])

    def make(self, views: Tensor, epoch: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S] and labels int64 [B] of one of `views`, in the size of the epoch
        whose views were asked for last."""
        images, labels, _ = self._prepare(*views, epoch)
        return images, labels

    def _prepare(self, rows: Tensor, numbers: Tensor, epoch: Tensor) -> Batch:
        images = kernels.image_prep(
            self.pixels, numbers, epoch, rows=rows, size=self._size, **self._view
        )
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
        self.size_at = loader.size_at
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
