"""Every command in about a minute, on dishes that Lapis draws: `python examples/tour.py`.

It trains two micro networks, shows them photos, evaluates, compares, asks the doctor, exports, and
fuses a ResNet of torchvision. What it makes stays in a new folder, whose name it prints at the end.
"""

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision

import models
from train.data.synthetic import open_source

# "auto" compiles where there is no GPU, which takes longer than this tour
BACKEND = "auto" if torch.cuda.is_available() else "eager"
CHECKOUT = Path(__file__).resolve().parents[1]
TRAIN = ("train.run", "--image-size", "64", "--val-scale", "1", "--epochs", "6")


def main() -> None:
    """The tour. Stops at the first command that fails."""
    started = time.perf_counter()
    place = Path(tempfile.mkdtemp(prefix="lapis-tour-"))
    photos, plain, residual = place / "photos", place / "plain", place / "residual"
    draw(photos, of_each=40)

    run("What is wrong with these photos?", "train.data.check", photos, "--out", place / "check")
    for name, out in (("micro_plain", plain), ("micro_resnet", residual)):
        run(f"Train a network: {name}", *TRAIN, "--data", photos, "--model", name, "--out", out)
    known = ("--checkpoint", residual)
    run("What is on these photos?", "train.predict", *known, photos / "rendang")
    evaluation = ("--data", photos, "--out", place / "evaluation")
    run("How good is it, and what has it seen?", "train.evaluate", *known, *evaluation)
    run("Which of the two?", "train.compare", plain, residual, "--out", place / "comparison")
    run("What went wrong?", "train.doctor", residual)
    run("For other programs", "train.export", *known, "--format", "safetensors")
    fuse()
    print(f"\n{time.perf_counter() - started:.0f} s; open {residual / 'report.html'}")


def draw(folder: Path, of_each: int) -> None:
    """A folder per dish with drawings of it, as a camera would leave them."""
    dishes = open_source("synthetic", seed=1)
    for row, file in enumerate(dishes.files):
        dish, number = Path(file).parent.name, int(Path(file).stem)
        if number < of_each:
            (folder / dish).mkdir(parents=True, exist_ok=True)
            dishes.load(file).save(folder / dish / f"IMG_{row:04}.JPG")


def run(title: str, *words: str | Path) -> None:
    """`python -m WORDS` in the checkout, shown as it would be typed."""
    command = list(map(str, words))
    print(f"\n== {title}\n$ python -m {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", *command], cwd=CHECKOUT, check=True)


def fuse() -> None:
    """A ResNet of torchvision on our units says the same as before."""
    print("\n== Kernels in a ResNet of torchvision")
    network = torchvision.models.resnet18(num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = network(images)
        fused = models.fuse(network, BACKEND)
        away = (fused(images) - before).abs().max().item()
    print(models.fuse_report(fused))
    print(f"its logits differ from torchvision's by at most {away:.1e}")


if __name__ == "__main__":
    main()
