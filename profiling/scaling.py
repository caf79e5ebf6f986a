"""What training on several GPUs should bring: computed from a step measured on one GPU and from
link speeds that are assumptions, none of it measured on several.

    python -m profiling.scaling --gpus 8 64 --network 50

S bytes are reduced within the g GPUs of a machine and between the m machines, each GPU sending a
g-th over a network card of its own (a reduce-scatter, an all-reduce, an all-gather):

    bytes a GPU sends   2 (g-1)/g S by NVLink,  2 (m-1)/m S/g by the network
    time                the sum of bytes / rate, and 2 (g-1) + 2 (m-1) hops of latency
    packing             S read and written to make one tensor, and S read and written behind it
    efficiency          step / (step + packing + all-reduce): nothing overlaps today
    with overlap        step / (step + packing + what of the all-reduce outlasts the backward pass)
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from models import build_model
from profiling.roofline import H200
from train.arguments import Parser

RESULTS = Path(__file__).with_name("results") / "h100" / "results.csv"
BACKWARD = 2 / 3  # of a step: two matrix products to the forward pass's one
PROVIDERS = ("eager_amp_channels_last", "ours_graph")


@dataclass(frozen=True)
class Links:
    """GB/s a GPU sends to others of its machine and to other machines, microseconds a hop, GB/s it
    copies (read and write), and how many GPUs a machine has."""

    nvlink: float
    network: float
    latency: float
    memory: float
    machine: int


@dataclass(frozen=True)
class Scaling:
    """Milliseconds of one step's parts on `gpus` GPUs, and MB that each sends."""

    gpus: int
    step: float
    packing: float
    reducing: float
    nvlink_mb: float
    network_mb: float

    @property
    def efficiency(self) -> float:
        return self.step / (self.step + self.packing + self.reducing)

    @property
    def overlapped(self) -> float:
        left = max(0.0, self.reducing - BACKWARD * self.step)
        return self.step / (self.step + self.packing + left)


def message(model: torch.nn.Module) -> int:
    """Bytes that a process gives to a step's all-reduce: float32 gradients, running statistics, the
    loss and the count of right answers (`train.distributed.exchange`)."""
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    return 4 * (sum(t.numel() for t in [*model.parameters(), *statistics]) + 2)


def scaled(gpus: int, step: float, size: int, links: Links) -> Scaling:
    """A step of `step` milliseconds whose message has `size` bytes, on `gpus` GPUs. Raises
    ValueError unless they fill their machines."""
    here = min(gpus, links.machine)
    machines, rest = divmod(gpus, here)
    if rest:
        raise ValueError(f"{gpus} GPUs do not fill machines of {links.machine}")
    nvlink = 2 * (here - 1) / here * size
    network = 2 * (machines - 1) / machines * size / here
    hops = 2 * (here - 1) + 2 * (machines - 1)
    seconds = nvlink / (links.nvlink * 1e9) + network / (links.network * 1e9)
    reducing = 1e3 * seconds + 1e-3 * links.latency * hops
    packing = 0.0 if gpus == 1 else 1e3 * 4 * size / (links.memory * 1e9)
    return Scaling(gpus, step, packing, reducing, nvlink / 1e6, network / 1e6)


def measured(provider: str, batch: int) -> float:
    """Microseconds an image of ResNet-34's training step on an H100, 224 px, from the results."""
    with RESULTS.open(newline="") as stream:
        times = [
            float(row["us_per_image"])
            for row in csv.DictReader(stream)
            if (row["provider"], row["model"], row["mode"]) == (provider, "resnet34", "train")
            and (row["batch"], row["image_size"]) == (str(batch), "224")
        ]
    return times[-1]  # the file only grows


def table(gpus: list[int], batch: int, size: int, links: Links) -> list[str]:
    """Rows of a Markdown table, for every provider and number of GPUs."""
    lines = [
        f"| step, {batch} images a GPU | GPUs | step | sent by NVLink | by network | packing | "
        "all-reduce | efficiency | with overlap | images/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for provider in PROVIDERS:
        for count in gpus:
            found = scaled(count, measured(provider, batch) * batch / 1e3, size, links)
            rate = found.efficiency * count * batch / found.step * 1e3
            lines.append(
                f"| {provider} | {count} | {found.step:.2f} ms | {found.nvlink_mb:.1f} MB | "
                f"{found.network_mb:.1f} MB | {found.packing:.2f} ms | {found.reducing:.2f} ms | "
                f"{found.efficiency:.1%} | {found.overlapped:.1%} | {rate:,.0f} |"
            )
    return lines


def feeding(rate: float, photo_kb: float, decoded: float, augmented: float) -> str:
    """What has to arrive for `rate` images a second."""
    return (
        f"{rate:,.0f} images/s read {rate * photo_kb / 1e6:.1f} GB/s of photos of {photo_kb:g} kB, "
        f"and take {rate / decoded:,.0f} cores that decode {decoded:g} photos a second each and "
        f"{rate / augmented:,.0f} that augment {augmented:g}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser("profiling.scaling", __doc__)
    options = parser.add_argument
    options("--gpus", type=int, nargs="+", default=[1, 8, 64])
    options("--machine", type=int, default=8, help="GPUs of a machine")
    options("--nvlink", type=float, default=360.0, help="GB/s a GPU sends within its machine")
    options("--network", type=float, default=40.0, help="GB/s a GPU sends to other machines")
    options("--latency", type=float, default=10.0, help="microseconds a hop")
    options("--photo-kb", type=float, default=50.0, help="kB of a stored photo")
    options("--decoded", type=float, default=700.0, help="photos a core decodes in a second")
    options("--augmented", type=float, default=1500.0, help="images a core augments in a second")
    given = parser.parse_args(argv)
    with torch.device("meta"):
        model = build_model("resnet34", 5)
    size = message(model)
    links = Links(given.nvlink, given.network, given.latency, H200.copy_gb_s, given.machine)
    print(f"ResNet-34: a step's message has {size:,} bytes.\n")
    for batch in (256, 32):
        print("\n".join(table(given.gpus, batch, size, links)), end="\n\n")
    for count in given.gpus:
        step = measured(PROVIDERS[-1], 256) * 256 / 1e3
        rate = scaled(count, step, size, links).efficiency * count * 256 / step * 1e3
        told = feeding(rate, given.photo_kb, given.decoded, given.augmented)
        print(f"- {count} GPU{'s' * (count > 1)}: {told}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
