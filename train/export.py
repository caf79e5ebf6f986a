"""A trained network for other programs: `python -m train.export --checkpoint RUN --format onnx`.

    state_dict    torch.save of torchvision's keys and tensors: load it into torchvision's model
    safetensors   the same tensors; classes, configuration, temperature and a SHA-256 of all this
                  as metadata
    onnx          the network with BatchNorm folded in, for any batch size
    program       a torch.export program (.pt2), for any batch size

All take images float32 [N, 3, S, S], the photo's centre square resized to S, over 255, minus mean,
over std as ImageNet's; onnx and program give logits float32 [N, K]. onnx is checked against the
network before it is kept.
"""

import argparse
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models import folded
from train import checkpoint
from train.arguments import Parser
from train.command import run_command
from train.config import Config, to_dict
from train.data.augment import MEAN, STD
from train.errors import NumericError, UsageError
from train.files import write_atomically
from train.inputs import centre_of, stored_size
from train.predictor import (
    SHA256_ENTRY,
    described,
    digest_of,
    network,
    onnx_digests,
    weights_file,
)

TOLERANCE = 1e-4  # of logits, between the network and its ONNX program


@dataclass(frozen=True)
class Source:
    """The network of a checkpoint, in float32 on the CPU, and what is said of it."""

    model: nn.Module
    config: Config
    classes: tuple[str, ...]
    temperature: float

    def metadata(self) -> dict[str, str]:
        """What a file says of itself: JSON under each key."""
        data = self.config.data
        side = stored_size(data)
        first, last = centre_of(side, data)
        values = {
            "classes": self.classes,
            "config": to_dict(self.config),
            "temperature": self.temperature,
            "preprocessing": {
                "resize_shorter_side": side,
                "centre_crop": last - first,
                "image_size": data.evaluated_size,
                "mean": MEAN,
                "std": STD,
            },
        }
        return {key: json.dumps(value) for key, value in values.items()}

    def example(self, batch: int) -> Tensor:
        """Random images for tracing and checking."""
        size = self.config.data.evaluated_size
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, 3, size, size, generator=generator)


def export_state_dict(source: Source, out: Path) -> None:
    buffer = io.BytesIO()
    torch.save(source.model.state_dict(), buffer)
    write_atomically(out, buffer.getvalue())


def export_safetensors(source: Source, out: Path) -> None:
    from safetensors.torch import save

    tensors = {name: value.contiguous() for name, value in source.model.state_dict().items()}
    metadata = source.metadata()
    metadata["sha256"] = digest_of(tensors, metadata)
    write_atomically(out, save(tensors, metadata))


def export_onnx(source: Source, out: Path) -> None:
    """Raises UsageError without the packages, NumericError where the program computes otherwise."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UsageError(
            f"--format onnx needs {error.name}: pip install -e '.[onnx]' -c constraints.txt"
        ) from None
    model = folded(source.model, source.config.data.evaluated_size)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's, of its own exporter
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model,
            (source.example(2),),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        program = onnx.load(path)
    blank = "0" * 64
    onnx.helper.set_model_props(program, source.metadata() | {"sha256": blank})
    data = sealed_onnx(program.SerializeToString(), blank)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    images = source.example(3)
    with torch.inference_mode():
        expected = source.model(images)
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    away = (found - expected).abs().max().item()
    if not away <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise NumericError(f"the ONNX program is off by {away:.2g}: nothing was written")
    write_atomically(out, data)


def sealed_onnx(data: bytes, named: str) -> bytes:
    """An ONNX program that names the SHA-256 `named`, with the right one in its place."""
    _, digest = onnx_digests(data)
    return data.replace(SHA256_ENTRY + named.encode(), SHA256_ENTRY + digest.encode())


def export_program(source: Source, out: Path) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        source.model, (source.example(2),), dynamic_shapes={"x": {0: batch}}
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=source.metadata())
    write_atomically(out, buffer.getvalue())


FORMATS: dict[str, tuple[str, Callable[[Source, Path], None]]] = {
    "state_dict": (".pth", export_state_dict),
    "safetensors": (".safetensors", export_safetensors),
    "onnx": (".onnx", export_onnx),
    "program": (".pt2", export_program),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Export as the flags say; returns the exit code."""
    parser = Parser("train.export", __doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="RUN_OR_FILE",
        help="run folder or checkpoint",
    )
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        default="safetensors",
        help="what to write (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: model.* in the run folder"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments), debug=arguments.debug)


def run(arguments: argparse.Namespace) -> Path:
    """Export; returns the file. Raises CheckpointError, DiskError and what the format does."""
    source = load_source(arguments.checkpoint)
    ending, export = FORMATS[arguments.format]
    folder = arguments.checkpoint
    out = arguments.out or (folder if folder.is_dir() else folder.parent) / f"model{ending}"
    if out.suffix != ending:
        raise UsageError(f"--out {out}: a {arguments.format} file ends in {ending}")
    export(source, out)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return out


def load_source(path: Path) -> Source:
    """What a run folder or checkpoint holds. Raises CheckpointError."""
    path = weights_file(path)
    state = checkpoint.load(path)
    config, classes, temperature = described(state, path)
    model = network(config, len(classes), state.get("weights"), path)
    return Source(model, config, classes, temperature)


if __name__ == "__main__":
    sys.exit(main())
