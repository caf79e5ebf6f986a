"""How fast photos reach the training, against torchvision's and timm's loaders on the same files:

    python -m profiling.data_speed --data PATH [PATH ...] --out DIR

Measured in turns, with the photos in the system's file cache: filling our cache of squares against
one process of Pillow (open, turn upright, convert, resize); the time from a path to the first
batch, ours with an empty cache (everything is decoded first) and with a filled one; and images a
second once the batches flow. All make random resized crops, flips and colour changes of the same
strength; ours and torchvision's rotate too. The split is no part of it. results.csv and summary.md
go to DIR.
"""

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from kernels import timing
from kernels.timing import Sampler, Timing
from profiling import rows
from train.arguments import Parser
from train.data import Loader, Photos, load_images, open_photos
from train.data.augment import MEAN, STD, STRENGTHS
from train.data.cache import square
from train.data.photos import PhotoFolder
from train.errors import LapisError, UsageError

LENGTH = 10**6  # samples of an endless epoch: its ends are no part of a steady rate
WINDOW_S = 0.8
AHEAD = 4  # batches that may lie ready while another provider has its turn
Batches = Iterator[torch.Tensor]
Provider = Callable[["Job", bool], Batches]


class Job:
    """One set of photos to be fed in batches of [batch, 3, size, size].

    root: a folder per class, of links to the photos, as ImageFolder wants it.
    """

    def __init__(self, data: str, size: int, batch: int, root: Path):
        self.data, self.size, self.batch, self.root = data, size, batch, root
        self.store = round(size * 8 / 7)  # as training does: a margin for crops and turns
        self.photos: Photos = open_photos(data)
        if not isinstance(self.photos.load, PhotoFolder):
            raise UsageError(f"--data {data} has no photo files: give a folder of photos.")
        for file, label in zip(self.photos.files, self.photos.labels, strict=True):
            link = root / self.photos.classes[label] / file.replace("/", "-")
            link.parent.mkdir(exist_ok=True)
            link.symlink_to((self.photos.load.root / file).resolve())


class Folder(ImageFolder):
    """torchvision's ImageFolder; `endless`: its photos over and over."""

    def __init__(self, root: Path, endless: bool, transform=None):
        super().__init__(str(root), transform)
        self.endless = endless

    def __len__(self) -> int:
        return LENGTH if self.endless else len(self.samples)

    def __getitem__(self, index: int):
        return super().__getitem__(index % len(self.samples))


def ours(workers: int) -> Provider:
    """Cached squares, augmented by `workers` threads."""

    def batches(job: Job, endless: bool) -> Batches:
        photos = open_photos(job.data)
        images, photos = load_images(photos, job.store, progress=False)
        indices = np.arange(LENGTH if endless else len(photos)) % len(photos)
        loader = Loader(
            images,
            photos.labels,
            indices,
            batch_size=job.batch,
            image_size=job.size,
            augment="strong",
            shuffle=True,
            workers=workers,
        )
        for batch in loader.epoch(0):
            yield batch.images

    return batches


def torchvision_loader(workers: int) -> Provider:
    """ImageFolder, transforms and DataLoader with `workers` processes."""

    def batches(job: Job, endless: bool) -> Batches:
        strong = STRENGTHS["strong"]
        transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(job.size, (strong.area, 1)),
                transforms.RandomHorizontalFlip(),
                transforms.RandomRotation(strong.degrees),
                transforms.ColorJitter(strong.colour, strong.colour, strong.colour),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )
        dataset = Folder(job.root, endless, transform)
        for images, _ in DataLoader(dataset, job.batch, shuffle=True, num_workers=workers):
            yield images

    return batches


def timm_loader(workers: int) -> Provider:
    """timm's create_loader with `workers` processes, without its prefetcher, which is for CUDA."""

    def batches(job: Job, endless: bool) -> Batches:
        from timm.data import create_loader  # a peer, installed with the test dependencies

        strong = STRENGTHS["strong"]
        loader = create_loader(
            Folder(job.root, endless),
            input_size=(3, job.size, job.size),
            batch_size=job.batch,
            is_training=True,
            use_prefetcher=False,
            scale=(strong.area, 1),
            color_jitter=strong.colour,
            interpolation="bilinear",
            mean=MEAN,
            std=STD,
            num_workers=workers,
            persistent_workers=False,
            device=torch.device("cpu"),
        )
        for images, _ in loader:
            yield images

    return batches


PROVIDERS: dict[str, Provider] = {
    "ours, 0 threads": ours(0),
    "ours, 2 threads": ours(2),
    "torchvision, 0 processes": torchvision_loader(0),
    "torchvision, 2 processes": torchvision_loader(2),
    "timm, 2 processes": timm_loader(2),
}
OURS, PILLOW, RIVAL = "ours, 2 threads", "Pillow, 1 process", "torchvision, 2 processes"


@contextmanager
def cache_in(folder: Path | None) -> Iterator[None]:
    """Run with the cache in `folder`, None: in an empty one."""
    before = os.environ.get("LAPIS_CACHE")
    with tempfile.TemporaryDirectory() as empty:
        os.environ["LAPIS_CACHE"] = str(folder or empty)
        try:
            yield
        finally:
            if before is None:
                del os.environ["LAPIS_CACHE"]
            else:
                os.environ["LAPIS_CACHE"] = before


def _microseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e6


def measure_build(job: Job, rounds: int) -> dict[str, Timing]:
    """Microseconds a photo, from a path to squares: ours into an empty cache; Pillow one by one."""

    def build() -> float:
        with cache_in(None):
            return _microseconds(
                lambda: load_images(open_photos(job.data), job.store, progress=False)
            )

    def pillow() -> float:
        def decode(file: str) -> np.ndarray:
            with Image.open(job.photos.load.root / file) as image:
                return square(ImageOps.exif_transpose(image).convert("RGB"), job.store)

        return _microseconds(lambda: np.stack([decode(file) for file in job.photos.files]))

    count, method = len(job.photos), "perf_counter"
    samplers = {
        "ours": Sampler(lambda: build() / count, method),
        PILLOW: Sampler(lambda: pillow() / count, method),
    }
    return timing.measure(samplers, rounds)


def measure_first_batch(job: Job, rounds: int, filled: Path) -> dict[str, Timing]:
    """Microseconds from a path to the first batch; ours also with an empty cache."""

    def sampler(provider: Provider, cache: Path | None) -> Sampler:
        def sample() -> float:
            with cache_in(cache):
                batches = provider(job, False)
                spent = _microseconds(lambda: next(batches))
                batches.close()
            return spent

        return Sampler(sample, "perf_counter")

    samplers = {name: sampler(provider, filled) for name, provider in PROVIDERS.items()}
    samplers[f"{OURS}, empty cache"] = sampler(PROVIDERS[OURS], None)
    return timing.measure(samplers, rounds)


def measure_rate(job: Job, rounds: int, filled: Path) -> dict[str, Timing]:
    """Microseconds an image of endless batches, once those that lay ready are used up."""

    def sampler(name: str, batches: Batches) -> Sampler:
        def sample() -> float:
            for _ in range(0 if ", 0 " in name else AHEAD):
                next(batches)
            count, start = 0, time.perf_counter()
            while count < 2 * job.batch or time.perf_counter() - start < WINDOW_S:
                count += len(next(batches))
            return (time.perf_counter() - start) * 1e6 / count

        return Sampler(sample, "perf_counter")

    with cache_in(filled):
        streams = {name: provider(job, True) for name, provider in PROVIDERS.items()}
        try:
            return timing.measure({n: sampler(n, stream) for n, stream in streams.items()}, rounds)
        finally:
            for stream in streams.values():
                stream.close()


def measure(job: Job, rounds: int, filled: Path, out: Path) -> str:
    """All of it for one set of photos: rows in results.csv, and a Markdown table."""
    stages = tqdm(total=3, desc=job.photos.name, bar_format="{desc}: {n_fmt} of 3 done, {elapsed}")
    with stages:
        build = measure_build(job, rounds)
        stages.update()
        first = measure_first_batch(job, rounds, filled)
        stages.update()
        rate = measure_rate(job, rounds, filled)
        stages.update()
    tables = {"fill the cache": (build, PILLOW), "feed": (rate, RIVAL), "first batch": (first, "")}
    place = rows.environment(torch.device("cpu"))
    for mode, (results, baseline) in tables.items():
        for provider, found in results.items():
            row = place | {
                "provider": provider,
                "model": f"photos {job.photos.name}",
                "mode": mode,
                "batch": job.batch,
                "image_size": job.size,
                "shape": f"{len(job.photos)} photos",
                "dtype": "uint8" if mode == "fill the cache" else "float32",
                "method": f"{found.method}, n={found.n}",
            }
            if mode == "first batch":
                row |= {"first_step_s": found.median_us / 1e6}
            else:
                row |= {"us_per_image": found.median_us, "low": found.low_us, "high": found.high_us}
                row |= {"images_per_second": 1e6 / found.median_us}
                times = timing.speedup(results[baseline], found)
                row |= dict(zip(("speedup", "speedup_low", "speedup_high"), times, strict=True))
            rows.append(out / "results.csv", row)
    return table(job, build, first, rate)


def table(
    job: Job, build: dict[str, Timing], first: dict[str, Timing], rate: dict[str, Timing]
) -> str:
    """The results of one set in Markdown; medians, with the quartiles in brackets."""
    times, low, high = timing.speedup(build[PILLOW], build["ours"])
    lines = [
        f"{job.photos.name}: {len(job.photos)} photos, {job.size} px, batches of {job.batch}",
        "",
        f"Filling the cache: {_seconds(build['ours'], len(job.photos))}, Pillow in one process "
        f"{_seconds(build[PILLOW], len(job.photos))}: {times:.1f} times as fast "
        f"({low:.1f} to {high:.1f}).",
        "",
        "| loader | first batch | images/s | times torchvision with 2 processes |",
        "|---|---|---|---|",
    ]
    for name in first:
        row = f"| {name} | {_seconds(first[name])} |"
        if name not in rate:
            lines.append(f"{row} | |")
            continue
        per_second = [
            1e6 / us for us in (rate[name].median_us, rate[name].high_us, rate[name].low_us)
        ]
        times, low, high = timing.speedup(rate[RIVAL], rate[name])
        lines.append(
            "{} {:,.0f} ({:,.0f} to {:,.0f}) | {:.2f} ({:.2f} to {:.2f}) |".format(
                row, *per_second, times, low, high
            )
        )
    return "\n".join(lines) + "\n"


def _seconds(found: Timing, count: int = 1) -> str:
    median, low, high = (us * count / 1e6 for us in (found.median_us, found.low_us, found.high_us))
    return f"{median:.3g} s ({low:.3g} to {high:.3g})"


def main(argv: list[str] | None = None) -> int:
    parser = Parser("profiling.data_speed", __doc__)
    parser.add_argument("--data", nargs="+", required=True, help="folders of photos")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of results.csv and summary.md"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=224,
        help="height and width of the images in pixels (%(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images a batch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="samples of everything")
    options = parser.parse_args(argv)
    # Pillow warns of palettes once a photo, in every process
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    texts = []
    try:
        for data in options.data:
            with tempfile.TemporaryDirectory() as links, tempfile.TemporaryDirectory() as filled:
                job = Job(data, options.image_size, options.batch_size, Path(links))
                texts.append(measure(job, options.rounds, Path(filled), options.out))
            print(texts[-1], flush=True)
    except LapisError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    (options.out / "summary.md").write_text("\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
