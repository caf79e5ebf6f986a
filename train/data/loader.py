"""Batches for the training step, prepared ahead by a few threads.

What a batch holds depends on (seed, epoch, batch number) alone: the number of threads and where an
epoch was taken up again change nothing.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
import torch

from train import distributed
from train.data.augment import AUGMENTS, MEAN, STD, augment_batch, balanced_order, order
from train.errors import UsageError


class Batch(NamedTuple):
    """images: [B, 3, S, S], normalised; labels: int64 [B]; indices: int64, the rows of the whole
    batch, of which these are the images, or this process's share of them."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the training step takes."""
        return self.images, self.labels

    @property
    def share(self) -> int:
        """How many of the images are this process's."""
        return len(self.labels)


class BatchOrder:
    """Which of the rows `indices` each batch of an epoch holds.

    image_size: of the batches in pixels, or that of each epoch from 1 on.
    shuffle: a new order each epoch; a last batch of a single image then joins the one before it,
    because batch normalisation cannot train on one. drop_last: leave out a last partial batch.
    balance: int [len(indices)], their classes, to show each equally often; None shows every row
    once.
    part, parts: the process, and how many there are: each takes its share of every batch.
    """

    def __init__(
        self,
        indices: np.ndarray,
        *,
        batch_size: int,
        image_size: int | Sequence[int],
        shuffle: bool,
        drop_last: bool = False,
        seed: int = 0,
        balance: np.ndarray | None = None,
        part: int = 0,
        parts: int = 1,
    ):
        self.indices = np.asarray(indices, dtype=np.int64)
        self.balance = balance
        self.sizes = (image_size,) if isinstance(image_size, int) else tuple(image_size)
        self.shuffle = shuffle
        self.seed = seed
        self.bounds = _batch_bounds(len(self.indices), batch_size, drop_last, shuffle)
        self.shares = [
            tuple(first + place for place in distributed.share(last - first, part, parts))
            for first, last in self.bounds
        ]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.bounds)

    def size_at(self, epoch: int) -> int:
        """Height and width of the images of an epoch, in pixels."""
        return self.sizes[min(max(epoch, 1), len(self.sizes)) - 1]

    def shapes(self) -> set[tuple[int, int, int, int]]:
        """[N, 3, S, S] of the largest share of each size."""
        most = max(last - first for first, last in self.shares)
        return {(most, 3, size, size) for size in self.sizes}

    def rows(self, epoch: int) -> np.ndarray:
        """The rows of one epoch in order; batch i holds those from bounds[i][0] to bounds[i][1], of
        which those from shares[i][0] to shares[i][1] are this process's."""
        if not self.shuffle:
            return self.indices
        if self.balance is not None:
            return self.indices[balanced_order(self.balance, self.seed, epoch)]
        return self.indices[order(len(self.indices), self.seed, epoch)]

    def view_numbers(self, rows: np.ndarray) -> np.ndarray:
        """What decides the view of each of an epoch's rows: the row, and where it comes again, for
        another view, a number that no row has."""
        if self.balance is None:
            return rows
        sorted_rows = np.argsort(rows, kind="stable")
        first = np.searchsorted(rows, rows[sorted_rows], sorter=sorted_rows)
        times = np.empty_like(rows)
        times[sorted_rows] = np.arange(len(rows)) - first
        return rows + times * (self.indices.max() + 1)


class Loader(BatchOrder):
    """Iterates over `images[indices]` in batches, one epoch at a time.

    images: uint8 [N, store, store, 3]; labels: int [N]. The order is that of `BatchOrder`.
    workers: threads that prepare batches ahead; 0 prepares each when it is asked for.
    device: where the tensors end up; on CUDA through pinned memory, without waiting.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        indices: np.ndarray,
        *,
        batch_size: int,
        image_size: int | Sequence[int],
        augment: str = "none",
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        balance: np.ndarray | None = None,
        part: int = 0,
        parts: int = 1,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        workers: int = 2,
        device: torch.device | str | None = None,
    ):
        if augment not in AUGMENTS:
            raise UsageError(f"--augment {augment} is unknown: choose {', '.join(AUGMENTS)}.")
        super().__init__(
            indices,
            batch_size=batch_size,
            image_size=image_size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=seed,
            balance=balance,
            part=part,
            parts=parts,
        )
        if images.shape[1] < max(self.sizes):
            raise ValueError(f"images of {images.shape[1]} px are smaller than {max(self.sizes)}")
        self.images = images
        self.labels = torch.from_numpy(np.asarray(labels, dtype=np.int64))
        self.augment = augment
        self.channels_last = channels_last
        self.workers = workers
        self.device = torch.device(device or "cpu")
        self._table = normalisation_table(dtype)
        self._dtype = dtype

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from number `start` on.

        Closing the iterator stops the threads; what a thread raises is raised here.
        """
        rows = self.rows(epoch)
        numbers = self.view_numbers(rows)
        places = zip(self.bounds[start:], self.shares[start:], strict=True)
        chunks = [(rows[a:b], numbers[a:b], rows[first:last]) for (first, last), (a, b) in places]
        if not self.workers:
            yield from (self._to_device(self._prepare(*chunk, epoch)) for chunk in chunks)
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="lapis-loader")
        try:
            ahead: deque = deque()
            for chunk in chunks:
                ahead.append(pool.submit(self._prepare, *chunk, epoch))
                if len(ahead) > self.workers + 1:
                    yield self._to_device(ahead.popleft().result())
            while ahead:
                yield self._to_device(ahead.popleft().result())
        finally:
            pool.shutdown(cancel_futures=True)

    def batch(self, rows: np.ndarray, numbers: np.ndarray, epoch: int) -> Batch:
        """The batch of these rows, whose `numbers` decide their views."""
        return self._to_device(self._prepare(rows, numbers, rows, epoch))

    def _prepare(
        self, rows: np.ndarray, numbers: np.ndarray, whole: np.ndarray, epoch: int
    ) -> Batch:
        size = self.size_at(epoch)
        if len(rows):
            # the photo's own number, not its place in the batch, decides its random numbers
            pixels = augment_batch(
                [self.images[row] for row in rows], numbers, epoch, self.seed, self.augment, size
            )
            images = normalise(pixels, self._table, self._dtype).permute(0, 3, 1, 2)
        else:  # the last batch has too few images for all processes
            images = torch.empty(0, 3, size, size, dtype=self._dtype)
        if not self.channels_last:
            images = images.contiguous()
        batch = Batch(images, self.labels[torch.from_numpy(rows)], torch.from_numpy(whole))
        if self.device.type == "cuda":
            batch = Batch(*(tensor.pin_memory() for tensor in batch))
        return batch

    def _to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        return Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))


def _batch_bounds(
    count: int, batch_size: int, drop_last: bool, join_single: bool
) -> list[tuple[int, int]]:
    """(first, last) positions of each batch."""
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is not positive.")
    if drop_last and count < batch_size:
        raise UsageError(f"--batch-size {batch_size} is more than the {count} photos: lower it.")
    firsts = list(range(0, count, batch_size))
    if len(firsts) > 1 and (
        (drop_last and count % batch_size) or (join_single and count % batch_size == 1)
    ):
        firsts.pop()
    lasts = [*firsts[1:], len(firsts) * batch_size if drop_last else count]
    return list(zip(firsts, lasts, strict=True))


def normalisation_table(dtype: torch.dtype) -> np.ndarray:
    """What each of the 256 values becomes in each channel: [1, 256, 3], rounded once to `dtype`.

    OpenCV looks it up in one pass. It knows no bfloat16, so 16-bit types travel as their bits.
    """
    values = torch.arange(256, dtype=torch.float64)[:, None] / 255
    table = ((values - torch.tensor(MEAN, dtype=torch.float64)) / torch.tensor(STD)).to(dtype)
    if dtype == torch.float32:
        return table[None].numpy()
    return table[None].view(torch.int16).numpy()


def normalise(pixels: np.ndarray, table: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> `dtype`, the same shape."""
    out = np.empty(pixels.shape, table.dtype)
    flat = (-1, pixels.shape[2], 3)  # one tall picture
    cv2.LUT(pixels.reshape(flat), table, out.reshape(flat))
    return torch.from_numpy(out).view(dtype)
