"""Roofs measured on this device, floors from a kernel's cost, and how many programs a
multiprocessor of each architecture can hold.

A floor is the time below which no kernel of that cost can go: the larger of bytes / copy bandwidth
and FLOPs / matrix rate.
"""

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kernels import timing
from kernels.spec import Cost
from train.arguments import Parser
from train.errors import FOREIGN
from train.record import opened, write_json


@dataclass(frozen=True)
class Roofs:
    """Measured limits: GB/s of a large copy (read + write) and of one that stays in L2, TFLOP/s of
    a bf16 matrix product of random numbers, microseconds of a launch from Python and in a graph."""

    device: str
    copy_gb_s: float
    l2_gb_s: float
    matmul_tflop_s: float
    launch_us: float
    graph_launch_us: float


# Measured on an H200; stands in where there is no GPU (the floors of `profiling.aot`).
H200 = Roofs("H200", 4300.0, 0.0, 790.0, 0.0, 0.0)


@dataclass(frozen=True)
class Arch:
    """Limits of one architecture (CUDA C++ Programming Guide, compute capabilities), and the
    multiprocessors of its usual card."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    warps: int
    blocks: int
    registers: int = 65536


ARCHS: dict[str, Arch] = {
    "sm_80": Arch((8, 0), 108, 163 << 10, 164 << 10, 64, 32),  # A100
    "sm_86": Arch((8, 6), 84, 99 << 10, 100 << 10, 48, 16),  # RTX 3090, A40
    "sm_89": Arch((8, 9), 128, 99 << 10, 100 << 10, 48, 24),  # RTX 4090, L40
    "sm_90": Arch((9, 0), 132, 227 << 10, 228 << 10, 64, 32),  # H100, H200
    "sm_100": Arch((10, 0), 148, 227 << 10, 228 << 10, 64, 32),  # B200
    "sm_120": Arch((12, 0), 170, 99 << 10, 100 << 10, 48, 24),  # RTX 5090
}


def blocks_per_multiprocessor(arch: Arch, registers: int, shared_bytes: int, warps: int) -> int:
    """Programs of `warps` warps that fit on one multiprocessor at once; 0 when not even one does.

    Registers are handed out in units of 256 a warp; each block costs 1 KB of shared memory more.
    """
    if shared_bytes > arch.shared_per_block:
        return 0
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = arch.registers // per_warp // warps if registers else arch.blocks
    by_shared = arch.shared_per_multiprocessor // (shared_bytes + 1024)
    return min(arch.blocks, arch.warps // warps, by_registers, by_shared)


def floor_us(cost: Cost, roofs: Roofs) -> float:
    """Microseconds below which no kernel of this cost can go on a device with these roofs."""
    return max(cost.bytes / roofs.copy_gb_s * 1e-3, cost.flops / roofs.matmul_tflop_s * 1e-6)


def measure_roofs(device: torch.device) -> Roofs:
    """Measure `device` (about 3 seconds)."""
    cuda = device.type == "cuda"
    large = (1 << 30) if cuda else (1 << 26)
    small = torch.cuda.get_device_properties(device).L2_cache_size // 8 if cuda else 1 << 18
    side = 8192 if cuda else 1024
    with timing.side_stream(device), torch.no_grad():
        a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
        product = torch.empty_like(a)
        one = torch.zeros(1, device=device)
        samplers = {
            "copy": timing.graph_sampler([_copy(large, device)], device),
            "l2": timing.graph_sampler([_copy(small, device)] * 64, device),
            "matmul": timing.graph_sampler([lambda: torch.mm(a, b, out=product)], device),
            "launch": timing.loop_sampler([lambda: one.add_(1)], device),
            "graph": timing.graph_sampler([lambda: one.add_(1)] * 256, device),
        }
        us = {key: found.median_us for key, found in timing.measure(samplers).items()}
    return Roofs(
        device=timing.place(device)["device"],
        copy_gb_s=2 * large / us["copy"] * 1e-3,
        l2_gb_s=2 * small / us["l2"] * 1e-3,
        matmul_tflop_s=2 * side**3 / us["matmul"] * 1e-6,
        launch_us=us["launch"],
        graph_launch_us=us["graph"],
    )


def _copy(count: int, device: torch.device) -> timing.Call:
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def roofs_of(folder: Path, device: torch.device) -> Roofs:
    """The roofs in `folder`/roofs.json if they are this device's, else measured and put there."""
    path = folder / "roofs.json"
    with contextlib.suppress(*FOREIGN):  # else it is measured anew
        roofs = Roofs(**opened(json.loads(path.read_text())))
        if roofs.device == timing.place(device)["device"]:
            return roofs
    roofs = measure_roofs(device)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(roofs))
    return roofs


def main(argv: list[str] | None = None) -> int:
    parser = Parser("profiling.roofline", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of roofs.json")
    out = parser.parse_args(argv).out
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(asdict(roofs_of(out, device))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
