"""How fast photo files become probabilities, against the script one would write with torchvision:

    python -m profiling.predict_speed --checkpoint RUN_OR_FILE --data PATH --out DIR

Measured in turns, every provider over the same files, which lie in the system's file cache. Ours is
what `train.predict` does. The script is a DataLoader with two processes (Resize, CenterCrop,
ToTensor, Normalize) and torchvision's network of the same name and weights, in float32 and under
bfloat16 autocast. Nobody predicts mirror images. A provider whose probabilities are not those of
the script in float32 gets no speed-up. results.csv and summary.md go to DIR.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import default_loader
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from kernels import timing
from kernels.timing import Sampler, Timing
from profiling import rows
from train.arguments import Parser
from train.command import run_command
from train.data.augment import MEAN, STD
from train.data.photos import decode, photo_files
from train.environment import choose_amp, choose_device, set_threads
from train.errors import DataError, UsageError
from train.export import Source, load_source
from train.inputs import centre_of, stored_size
from train.predictor import load_trained, predict

OURS, SCRIPT, SCRIPT_BF16 = "ours", "torchvision script, float32", "torchvision script, bfloat16"
APART = 0.02  # mean difference of probabilities that another resampling and bfloat16 explain
Provider = Callable[[], Tensor]  # -> probabilities [N, K], float32 on the CPU


class Files(Dataset):
    """Photo files as the script's DataLoader takes them."""

    def __init__(self, files: list[str], transform: Callable):
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(default_loader(self.files[index]))


def ours(
    path: Path, files: list[str], batch: int, device: torch.device, amp: torch.dtype | None
) -> Provider:
    """`train.predict` with the network at `path`. It raises DataError for a damaged file."""
    trained = load_trained(path, device, amp)

    def load(file: str, size: int):
        return decode(Path(file), size)

    def run() -> Tensor:
        found = []
        for one in predict(trained, files, load, batch_size=batch, flips=False):
            if one.reason is not None:
                raise DataError(f"{one.name}: {one.reason}: leave it out of --data")
            found.append(one.probability)
        return torch.from_numpy(np.stack(found)).float()

    return run


def script(
    source: Source, files: list[str], batch: int, device: torch.device, bf16: bool
) -> Provider:
    """torchvision's network of the same name with the weights of `source`. Raises UsageError where
    they do not fit it."""
    name, data = source.config.model.model, source.config.data
    try:
        model = getattr(torchvision.models, name)(num_classes=len(source.classes))
        model.load_state_dict(source.model.state_dict())
    except (AttributeError, RuntimeError):
        raise UsageError(
            f"torchvision has no {name} as this run modified it: give a run of --model resnet34 "
            "and no other flag of the network"
        ) from None
    model = model.eval().to(device)
    side = stored_size(data)
    first, last = centre_of(side, data)
    transform = transforms.Compose(
        [
            transforms.Resize(side, InterpolationMode.BICUBIC),
            transforms.CenterCrop(last - first),
            transforms.Resize(data.evaluated_size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    @torch.inference_mode()
    def run() -> Tensor:
        found = []
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            for images in DataLoader(Files(files, transform), batch, num_workers=2):
                logits = model(images.to(device)).float()
                found.append((logits / source.temperature).softmax(1).cpu())
        return torch.cat(found)

    return run


def measure(
    providers: dict[str, Provider], photos: int, rounds: int
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Microseconds a photo, and the mean difference of its probabilities from the script's in
    float32, for each of `providers`."""
    bar = tqdm(total=(rounds + 1) * len(providers), unit=" turns")  # and one to warm up
    found: dict[str, Tensor] = {}

    def sampler(name: str) -> Sampler:
        def sample() -> float:
            start = time.perf_counter()
            found[name] = providers[name]()
            spent = time.perf_counter() - start
            bar.update()
            bar.set_postfix_str(f"{name}: {photos / spent:.1f} images/s")
            return spent * 1e6 / photos

        return Sampler(sample, "perf_counter")

    with bar:
        times = timing.measure({name: sampler(name) for name in providers}, rounds)
    return times, {name: float((p - found[SCRIPT]).abs().mean()) for name, p in found.items()}


def write(times: dict[str, Timing], apart: dict[str, float], row: rows.Row, out: Path) -> str:
    """Rows in results.csv, and a Markdown table; `row` has the dtype of ours."""
    dtypes = {OURS: row["dtype"], SCRIPT: "float32", SCRIPT_BF16: "bfloat16"}
    lines = ["| provider | images/s | times the script in float32 | in bfloat16 | difference |"]
    lines.append("|---|---|---|---|---|")
    for name, found in times.items():
        right = apart[name] <= APART
        filled = row | {
            "provider": name,
            "dtype": dtypes[name],
            "baseline": SCRIPT,
            "us_per_image": found.median_us,
            "low": found.low_us,
            "high": found.high_us,
            "n": found.n,
            "images_per_second": 1e6 / found.median_us,
            "method": found.method,
            "numerics": f"probabilities apart {apart[name]:.1e}",
        }
        cells = ["", ""]
        if right:
            ratios = [timing.speedup(times[other], found) for other in (SCRIPT, SCRIPT_BF16)]
            filled |= dict(zip(("speedup", "speedup_low", "speedup_high"), ratios[0], strict=True))
            cells = ["{:.2f} ({:.2f} to {:.2f})".format(*ratio) for ratio in ratios]
        rows.append(out / "results.csv", filled)
        speeds = [1e6 / us for us in (found.median_us, found.high_us, found.low_us)]
        lines.append(
            "| {} | {:.1f} ({:.1f} to {:.1f}) | {} | {} | {:.1e} |".format(
                name, *speeds, *cells, apart[name]
            )
        )
    return "\n".join(lines) + "\n"


def parser() -> Parser:
    """The command line."""
    parser = Parser("profiling.predict_speed", __doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="RUN_OR_FILE",
        help="run folder or checkpoint of a network that torchvision has",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of photos")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of results.csv and summary.md"
    )
    parser.add_argument(
        "--photos", type=int, default=200, help="photos a turn, of those there (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="photos a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of everyone (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure as the flags say; returns the exit code."""
    options = parser().parse_args(argv)
    return run_command(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure and write. Raises DataError, CheckpointError or UsageError."""
    for flag in ("photos", "batch_size", "rounds"):
        if getattr(options, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} must be at least 1")
    names, _ = photo_files(options.data)
    if not names:
        raise UsageError(f"--data {options.data} has no photo files: give a folder of photos")
    # every k-th, so that all classes come
    names = names[:: max(1, len(names) // options.photos)][: options.photos]
    files, batch = [str(options.data / name) for name in names], options.batch_size
    set_threads(None)
    device = choose_device("auto")
    amp, source = choose_amp("auto", device), load_source(options.checkpoint)
    providers = {
        OURS: ours(options.checkpoint, files, batch, device, amp),
        SCRIPT: script(source, files, batch, device, bf16=False),
        SCRIPT_BF16: script(source, files, batch, device, bf16=True),
    }
    times, apart = measure(providers, len(files), options.rounds)
    size = source.config.data.evaluated_size
    row = rows.environment(device) | {
        "model": source.config.model.model,
        "mode": "predict",
        "batch": batch,
        "image_size": size,
        "shape": f"{len(files)} photos of {options.data.name}",
        "dtype": str(amp or torch.float32).removeprefix("torch."),
    }
    text = (
        f"{source.config.model.model}, {len(files)} photos of {options.data.name}, {size} px, "
        f"batches of {batch}, {row['device']}; medians of {options.rounds} turns with quartiles\n\n"
    ) + write(times, apart, row, options.out)
    (options.out / "summary.md").write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
