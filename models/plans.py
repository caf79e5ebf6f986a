"""Which plan each block of the trunk runs on: measured on the GPU at hand, remembered, and checked
for the very shapes before it counts. Where nothing is known it is the baseline.

Measuring compiles every candidate for every distinct block, minutes on a first run: it is done
where it is asked for (`set_backend(model, "triton", plan="measure")`, or a run long enough).

A block is measured alone, forward and backward together, as it stands between its neighbours: see
`trials`.
"""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch

from kernels.choices import key_for
from kernels.select import Job, choose
from models import trials
from models.launches import PLANS
from models.trials import Check, Shape, Site
from models.trunk import Block

BASELINE = "P1"
SOURCES = tuple(
    Path(__file__).resolve().with_name(name)
    for name in ("plans.py", "trials.py", "trunk.py", "launches.py")
)


def site_of(block: Block, shape: Shape) -> tuple[Site, Shape]:
    """What the choice for a block depends on, and the shape of the block's output."""
    convs = [*block.convs, *([block.shortcut] if block.shortcut is not None else [])]
    geometry = tuple(
        (conv.weight.shape[0], conv.weight.shape[2], conv.stride, conv.padding) for conv in convs
    )
    dtype, has_shortcut = convs[0].weight.dtype, block.shortcut is not None
    site = Site(shape, geometry, block.acts, has_shortcut, block.adds, dtype, block.preact)
    return site, trials.output_shape(site)


def choose_plans(sites: Sequence[Site], device: torch.device, measure: bool) -> list[str]:
    """The name of the plan of every site on `device`, as `winners` says."""
    jobs = {site: job_for(site, device) for site in sites}
    found = dict(zip(jobs, winners(list(jobs.values()), device, measure), strict=True))
    return [found[site] for site in sites]


def winners(jobs: Sequence[Job], device: torch.device, measure: bool) -> list[str]:
    """The candidate to take for each of `jobs`: remembered or shipped, or, where `measure` asks for
    it, measured; else, and where there is no GPU, the baseline. With PyTorch's deterministic
    algorithms only what is shipped counts."""
    if device.type != "cuda":
        return [job.baseline for job in jobs]
    with torch.autocast(device.type, enabled=False):
        choices = choose(
            jobs, measure=measure, deterministic=torch.are_deterministic_algorithms_enabled()
        )
    return [choice.winner for choice in choices]


def settled_key(shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    """What a module's settled plans are kept under: all but the size of the batch."""
    size = "x".join(map(str, shape[1:]))
    return f"{size} {str(dtype).removeprefix('torch.')} {_card(device)}"


@cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def job_for(site: Site, device: torch.device) -> Job:
    """The candidates for one site: every plan, checked against the block in float32."""
    kind = "shortcut" if site.has_shortcut else "identity" if site.adds else "plain"
    if site.preact:
        kind = f"pre-activation {kind}"
    taps = " ".join(f"{k}x{r}x{r}/{stride}" for k, r, stride, _ in site.geometry)
    acts = " ".join(act or "raw" for act in site.acts)
    make_inputs, run, eager = (
        (trials.make_preact_inputs, trials.run_preact, trials.eager_preact)
        if site.preact
        else (trials.make_inputs, trials.run, trials.eager)
    )
    return Job(
        key=key_for(
            f"{kind} block {'x'.join(map(str, site.shape))} {taps} {acts}",
            site.dtype,
            device,
            SOURCES,
        ),
        candidates={name: partial(run, name, site) for name in PLANS},
        baseline=BASELINE,
        make_inputs=partial(make_inputs, site, device),
        check=Check(partial(make_inputs, site, device, 0), partial(eager, site), site.dtype),
    )
