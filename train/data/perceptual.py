"""Pairs of pictures that may show the same: the search behind `duplicates`.

A perceptual hash, the signs of the lowest cosine frequencies (Zauner, "Implementation and
benchmarking of perceptual image hash functions", 2010), is taken of each whole picture, of its
mirror image and of the windows a crop may have left. Hashes that fall into one bucket make a pair,
so the time grows with the pictures and not with their pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

SIDE = 64  # pixels of a thumbnail

# A crop may take up to 15 % of each side, or 35 % of one (a square out of a 3:2 picture), from
# both ends in steps of 5 %. Between the steps a window is off by 2.5 % at most, which the low
# frequencies hardly notice.
_STEPS = [(start, end) for start in range(8) for end in range(8) if start + end <= 7]
_SLIGHT = [(start / 20, 1 - end / 20) for start, end in _STEPS if start + end <= 3]
_STRONG = [(start / 20, 1 - end / 20) for start, end in _STEPS if start + end > 3]
_WHOLE = [(0.0, 1.0)]
_CROPS = ((_SLIGHT, _SLIGHT), (_STRONG, _WHOLE), (_WHOLE, _STRONG))
_WINDOWS = [(rows, columns) for both in _CROPS for rows in both[0] for columns in both[1]]
_FREQUENCIES = 8  # an axis
_ORDER = np.argsort(np.add.outer(np.arange(8), np.arange(8)).ravel(), kind="stable")[1:]
_PITCH = np.hypot(*np.divmod(_ORDER, 8)).astype(np.float32)  # evens out what low ones outweigh
_MIRROR = ((-1.0) ** (_ORDER % 8)).astype(np.float32)  # the odd cosines change sign in a mirror
_DOUBTFUL = 6  # bits of a key that may be misread: those whose cosine is next to nothing
_CROWD = 64  # photos looked at in one bucket, the same ones by all who look there
_MOST_BITS_APART = 18  # of 63; crops of photos and of drawings stay under 17
_LEAST_ALIKE = 0.86  # cosine between spectra; 98 % of 15 % crops reach 0.88
_BATCH = 256


@dataclass(frozen=True)
class Candidate:
    """`window` (left, top, width, height, as shares) of photo `large` looks like photo `small`."""

    large: int
    small: int
    mirrored: bool = False
    window: tuple[float, float, float, float] = (0, 0, 1, 1)


def candidates(thumbnails: np.ndarray, chosen: np.ndarray, progress: bool) -> Iterator[Candidate]:
    """Candidates among the `chosen` positions, by `large`, the most alike first."""
    n, k = len(chosen), len(_WINDOWS)
    if n < 2:
        return
    whole = ((_cosines(_WHOLE), _cosines(_WHOLE)),)
    crops = [(_cosines(rows), _cosines(columns)) for rows, columns in _CROPS]
    batches = [chosen[start : start + _BATCH] for start in range(0, n, _BATCH)]
    index = _Index(np.concatenate([_spectra(thumbnails[b], whole)[:, 0] for b in batches]))
    bar = tqdm(total=n, desc="comparing", unit=" photos", delay=1, disable=not progress)
    for number, batch in enumerate(batches):
        spectra = _spectra(thumbnails[batch], crops).reshape(-1, len(_ORDER))
        asked, entries = index.look_up(_hashes(spectra))
        large = asked // k + number * _BATCH
        other = large != entries % n
        asked, entries, large = asked[other], entries[other], large[other]
        alike = np.einsum("ij,ij->i", spectra[asked], index.spectra[entries])
        # of each pair the window that is most alike
        best = np.lexsort((-alike, entries, large))
        pairs = np.stack([large[best], entries[best]])
        best = best[np.flatnonzero(np.diff(pairs, prepend=-1).any(axis=0))]
        best = best[alike[best] >= _LEAST_ALIKE]
        for at in best[np.lexsort((-alike[best], large[best]))]:
            (top, bottom), (left, right) = _WINDOWS[asked[at] % k]
            mirrored, small = divmod(int(entries[at]), n)
            yield Candidate(
                int(chosen[large[at]]),
                int(chosen[small]),
                bool(mirrored),
                (left, top, right - left, bottom - top),
            )
        bar.update(len(batch))
    bar.close()


def _cosines(intervals: Sequence[tuple[float, float]]) -> np.ndarray:
    """Waves over each interval, as pixels see them: float32 [intervals * frequencies, SIDE]."""
    edges = np.arange(SIDE + 1) / SIDE
    rows = []
    for start, end in intervals:
        cover = np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], start), 0, None)
        cover /= cover.sum()
        at = ((edges[1:] + edges[:-1]) / 2 - start) / (end - start)
        for k in range(_FREQUENCIES):
            wave = np.cos(np.pi * k * at)
            rows.append(cover * (wave - (cover * wave).sum() * (k > 0)))
    return np.array(rows, dtype=np.float32)


def _spectra(thumbnails: np.ndarray, crops: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Unit vectors of the frequencies in each window: float32 [N, windows, 63].

    crops: cosines down and across; every interval of one with every interval of the other.
    """
    pixels, parts = thumbnails.astype(np.float32), []
    for down, across in crops:
        waves = (down @ pixels @ across.T).reshape(
            len(pixels), -1, _FREQUENCIES, len(across) // _FREQUENCIES, _FREQUENCIES
        )
        waves = waves.transpose(0, 1, 3, 2, 4).reshape(len(pixels), -1, _FREQUENCIES**2)
        parts.append(waves[..., _ORDER] * _PITCH)
    spectra = np.concatenate(parts, axis=1)
    return spectra / np.linalg.norm(spectra, axis=-1, keepdims=True).clip(1e-6)


def _hashes(spectra: np.ndarray) -> np.ndarray:
    """The signs as the bits of uint64 [...], the lowest frequencies in the lowest bits."""
    signs = np.concatenate([spectra > 0, np.zeros((*spectra.shape[:-1], 1), bool)], axis=-1)
    octets = np.packbits(signs, axis=-1, bitorder="little")
    return np.ascontiguousarray(octets).view("<u8")[..., 0]


class _Index:
    """Whole pictures and their mirror images by key, each also under its likely misreadings.

    The key is the low bits of the hash, so many that a bucket holds few pictures of any number.
    Entry e is the picture at position e % n, mirrored from n on.
    """

    def __init__(self, spectra: np.ndarray) -> None:
        self.spectra = np.concatenate([spectra, spectra * _MIRROR])
        self.hashes = _hashes(self.spectra)
        bits = min(24, max(12, len(spectra).bit_length() + 7))
        self.mask = np.uint64(2**bits - 1)
        doubtful = np.argpartition(np.abs(self.spectra[:, :bits]), _DOUBTFUL, axis=1)
        # key in the high half, entry in the low one: sorting needs no memory beside them
        flips = np.uint64(1) << (doubtful[:, :_DOUBTFUL] + 32).astype(np.uint64)
        keyed = (self.hashes & self.mask) << np.uint64(32) | np.arange(len(flips), dtype=np.uint64)
        keyed = keyed[:, None]
        for k in range(_DOUBTFUL):
            keyed = np.concatenate([keyed, keyed ^ flips[:, k : k + 1]], axis=1)
        keyed = keyed.ravel()
        keyed.sort()
        self.entries = keyed.astype(np.uint32)
        keyed >>= np.uint64(32)
        keyed += np.uint64(1)
        self.first = np.bincount(keyed.view(np.int64), minlength=2**bits + 1)
        np.cumsum(self.first, out=self.first)  # bucket k is entries[first[k] : first[k + 1]]

    def look_up(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in `hashes`, and the entries of their buckets whose hash is close."""
        keys = (hashes & self.mask).astype(np.int64)
        counts = np.minimum(self.first[keys + 1] - self.first[keys], _CROWD)
        asked = np.repeat(np.arange(len(hashes)), counts)
        place = np.arange(len(asked)) - np.repeat(np.cumsum(counts) - counts, counts)
        entries = self.entries[self.first[keys[asked]] + place]
        close = np.bitwise_count(self.hashes[entries] ^ hashes[asked]) <= _MOST_BITS_APART
        return asked[close], entries[close]
