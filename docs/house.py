"""The picture of the house and how data flows through it: `python -m docs.house` writes house.svg.

It is legible on light and dark paper: its colours follow the reader's scheme.
"""

from pathlib import Path
from typing import NamedTuple

SVG = Path(__file__).resolve().with_name("house.svg")
WIDTH, HEIGHT = 1000, 570
STYLE = """
svg { --paper: #fbfaf7; --card: #ffffff; --ink: #23211d; --soft: #6b665c; --line: #b9b3a5;
  --data: #2f7d55; --train: #22578f; --model: #a86400; --kernel: #b3372f; --profile: #6b4a9c; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #16171a; --card: #1e2024; --ink: #e6e3dc; --soft: #a09b90; --line: #55585f;
    --data: #74c794; --train: #8db8ea; --model: #e5ad55; --kernel: #f08d84; --profile: #c3a6f0; }
}
.paper { fill: var(--paper); }
.box { fill: var(--card); stroke-width: 1.5; }
text { font: 13px system-ui, "Segoe UI", Roboto, sans-serif; fill: var(--soft); }
.title { font-weight: 600; font-size: 15px; fill: var(--ink); }
.way { fill: none; stroke: var(--line); stroke-width: 2; marker-end: url(#tip); }
.looks { stroke-dasharray: 5 4; }
#tip path { fill: var(--line); }
"""


class Box(NamedTuple):
    """A place: its corner, size, the colour of its edge, and its lines, the first a title."""

    x: int
    y: int
    width: int
    height: int
    colour: str
    lines: tuple[str, ...]


BOXES = (
    Box(20, 150, 165, 140, "data", ("photos", "a folder per class", "train.csv + train/",
        "Food-101, tar shards", "synthetic dishes")),
    Box(225, 150, 180, 140, "data", ("train/data/", "decode once, cache", "find copies, split",
        "crop, turn, colour, mix", "on the CPU or the GPU")),
    Box(445, 150, 225, 140, "train", ("train/step.py, loop.py", "one training step,",
        "whole in a CUDA graph;", "listeners: checkpoints,", "doctor, progress, TensorBoard")),
    Box(710, 150, 270, 140, "train", ("the run folder", "report.html, summary.json,",
        "metrics and signals, split and", "validation, config, checkpoints",
        "(sealed with checksums)")),
    Box(710, 340, 270, 210, "train", ("what reads it", "train.predict, evaluate, compare",
        "train.export: ONNX, safetensors", "train.doctor: causes and remedies",
        "train.study: paired tests", "train.run --resume, --init-from")),
    Box(445, 340, 225, 95, "model", ("models/",
        "blocks, units, the trunk's", "plans, models.fuse")),
    Box(445, 485, 225, 65, "kernel", ("kernels/", "Triton, or PyTorch elsewhere")),
    Box(20, 340, 385, 95, "model", ("your own ResNet", "torchvision's or timm's, same parameters,",
        "same state_dict: models.fuse(model)")),
    Box(20, 485, 385, 65, "kernel", ("your own network",
        "kernels.bn_act, conv_stats, ... with gradients")),
    Box(225, 15, 445, 95, "profile", ("profiling/",
        "ranges by phase and layer, Nsight Systems, roofs,",
        "speed beside rivals, registers without a GPU")),
)  # fmt: skip
# from, to, and whether it only looks
WAYS = (
    ((185, 225), (221, 225), False),
    ((405, 225), (441, 225), False),
    ((670, 225), (706, 225), False),
    ((845, 290), (845, 336), False),
    ((557, 290), (557, 336), False),
    ((557, 435), (557, 481), False),
    ((405, 390), (441, 390), False),
    ((405, 518), (441, 518), False),
    ((557, 110), (557, 146), True),
    ((315, 110), (315, 146), True),
)


def drawn() -> str:
    """The picture as SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="How photos, networks and results flow through the house">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="5" '
        'markerHeight="5" orient="auto"><path d="M0 0 8 4 0 8z"/></marker></defs>',
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="12"/>',
    ]
    for (x, y), (to_x, to_y), looks in WAYS:
        kind = "way looks" if looks else "way"
        lines.append(f'<path class="{kind}" d="M{x} {y} {to_x} {to_y}"/>')
    for box in BOXES:
        lines.append(
            f'<rect class="box" style="stroke: var(--{box.colour})" x="{box.x}" y="{box.y}" '
            f'width="{box.width}" height="{box.height}" rx="8"/>'
        )
        for number, text in enumerate(box.lines):
            kind = "" if number else ' class="title"'
            lines.append(
                f'<text{kind} x="{box.x + 14}" y="{box.y + 26 + 24 * number}">{text}</text>'
            )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    SVG.write_text(drawn(), encoding="utf-8")
