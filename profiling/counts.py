"""Counts that must not grow, compared with those committed, so that a regression shows without a
GPU:

    env -u TRITON_INTERPRET python -m profiling.counts [--renew]

Of every kernel of `profiling.aot --arch sm_90 --quick`: programs, registers, spills, shared memory.
Of every plan of the trunk: launches, bytes through them and bytes kept for the backward, an image.
`tests/test_aot.py` compares in every run; after a change that is meant, `--renew` writes the
counts anew.
"""

import json
import sys
from dataclasses import asdict
from typing import Any

import torch

import models
from kernels import launch
from models.layers import run_trunk
from models.trunk import PLANS
from profiling import aot
from train.arguments import Parser

BASELINE = aot.RESULTS / "counts.json"
ARCH = "sm_90"
NETWORKS = ("resnet34", "plain34")
BATCH = 256
RENEW = "env -u TRITON_INTERPRET python -m profiling.counts --renew"
SLACK = {"bytes_per_image": 0.001, "kept_bytes_per_image": 0.001}  # a share; others may not grow
Counts = dict[str, dict[str, int]]


def of_kernels(found: list[dict[str, Any]]) -> Counts:
    """The counts of rows as `profiling.aot --json` writes them, the worst of a kernel's programs.

    Registers are rounded up to eights: that is how a multiprocessor hands them out. Raises
    ValueError for a kernel that did not compile: it would count as one that costs nothing.
    """
    counts: Counts = {}
    for row in found:
        if not row["registers"]:
            raise ValueError(f"{row['room']} {row['kernel']} has no counts: {row['fault']}")
        shape = "x".join(map(str, row["shape"]))
        name = f"{row['room']} {row['kernel']} {shape} {row['dtype']}"
        one = counts.setdefault(
            name, dict.fromkeys(("programs", "registers", "spills", "shared"), 0)
        )
        one["programs"] += 1
        one["registers"] = max(one["registers"], -(-row["registers"] // 8) * 8)
        one["spills"] = max(one["spills"], row["spills"])
        one["shared"] = max(one["shared"], row["shared_bytes"])
    return counts


def of_plans() -> Counts:
    """Launches and bytes of the trunk's forward and backward, made on meta tensors."""
    return {f"{name} {plan}": _of_plan(name, plan) for name in NETWORKS for plan in PLANS}


def _of_plan(name: str, plan: str) -> dict[str, int]:
    model = models.set_backend(models.build_model(name).to("meta"), "triton", plan)
    blocks = [block for number in range(1, 5) for block in getattr(model, f"layer{number}")]
    x = torch.empty(BATCH, 64, 56, 56, device="meta", dtype=torch.bfloat16, requires_grad=True)
    arch = aot.ARCHS[ARCH]
    with launch.record(arch.capability, arch.multiprocessors) as recording:
        y = run_trunk(blocks, x.contiguous(memory_format=torch.channels_last))
        kept = {id(tensor): tensor.nbytes for tensor in _tensors(y.grad_fn.saved)}
        y.backward(torch.empty_like(y))
    moved = sum(
        sum({id(tensor): tensor.nbytes for tensor in _tensors(one.args)}.values())
        for one in recording.launches
    )
    return {
        "launches": len(recording.launches),
        "bytes_per_image": moved // BATCH,
        "kept_bytes_per_image": sum(kept.values()) // BATCH,
    }


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def changes(before: Counts, now: Counts) -> tuple[list[str], list[str]]:
    """What grew, is new or is gone, a sentence each; and what fell."""
    grown, fallen = [], []
    for name in before.keys() | now.keys():
        if name not in before or name not in now:
            grown.append(f"{name} is {'gone' if name in before else 'new'}")
            continue
        for count in before[name].keys() | now[name].keys():
            was, found = before[name].get(count, 0), now[name].get(count, 0)
            sentence = f"{name}: {count} {was:,} -> {found:,}"
            if found > was * (1 + SLACK.get(count, 0.0)):
                grown.append(sentence)
            elif found < was:
                fallen.append(sentence)
    return sorted(grown), sorted(fallen)


def load() -> dict[str, Any]:
    """The committed counts: kernels, plans, and the triton that compiled them."""
    return json.loads(BASELINE.read_text())


def save(kernels: Counts, plans: Counts) -> None:
    """Write the counts, a line each, so that a change is a line of a diff."""
    parts = [f' "triton": {json.dumps(triton_version())}']
    for title, counts in (("plans", plans), ("kernels", kernels)):
        lines = (f"  {json.dumps(name)}: {json.dumps(counts[name])}" for name in sorted(counts))
        parts.append(f' "{title}": {{\n' + ",\n".join(lines) + "\n }")
    BASELINE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def triton_version() -> str:
    """Another version is another compiler: its registers say nothing of our change."""
    import triton

    return triton.__version__


def main(argv: list[str] | None = None) -> int:
    parser = Parser("profiling.counts", __doc__)
    parser.add_argument("--renew", action="store_true", help=f"write {BASELINE.name} anew")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that compile (%(default)s)"
    )
    args = parser.parse_args(argv)
    if launch.INTERPRET or launch.TRITON_MISSING:
        parser.error("needs Triton's compiler: install triton and unset TRITON_INTERPRET")
    programs, found = aot.plan_quick([ARCH])
    found += aot.compile_all(programs, args.workers)
    counted, plans = of_kernels([asdict(row) for row in found]), of_plans()
    if args.renew:
        save(counted, plans)
        print(f"{BASELINE}: {len(counted)} kernels, {len(plans)} plans")
        return 0
    known = load()
    results = [changes(known["plans"], plans), changes(known["kernels"], counted)]
    for grown, fallen in results:
        for sentence in (*(f"GREW {one}" for one in grown), *(f"fell {one}" for one in fallen)):
            print(sentence)
    if any(grown for grown, _ in results):
        print(f"if that is meant: {RENEW}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
