"""What a trained network says of photos: `python -m train.predict --checkpoint RUN IMAGE...`.

Photos are files or folders (searched below). Files that cannot be shown to the network are listed
and skipped; the exit code is then 3. Where there was validation the probabilities are calibrated on
it.
"""

import argparse
import csv
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.arguments import Parser
from train.cam import activation_maps, overlay
from train.command import run_command
from train.data.findings import counted
from train.data.photos import decode, photo_files
from train.environment import choose_amp, choose_device, set_threads
from train.errors import DataError, UsageError
from train.files import unwritable, write_atomically
from train.predictor import Prediction, Trained, load_trained, predict, progress

STDOUT = "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Predict as the flags say; returns the exit code."""
    arguments = parser().parse_args(argv)
    return run_command(
        lambda: run(arguments),
        debug=arguments.debug,
        interrupted="interrupted; nothing was written",
        no_memory="lower --batch-size",
    )


def parser() -> Parser:
    """The command line."""
    parser = Parser("train.predict", __doc__)
    parser.add_argument(
        "photos", nargs="*", metavar="IMAGE_OR_FOLDER", help="photos, and folders that are searched"
    )
    add_model_arguments(parser)
    for kind in ("csv", "json"):
        parser.add_argument(
            f"--{kind}",
            nargs="?",
            const=STDOUT,
            metavar=f"FILE.{kind}",
            help=f"write {kind.upper()} instead of the table, to the terminal without a file name",
        )
    parser.add_argument(
        "--top-k", type=int, default=3, help="classes shown for each photo (default: 3)"
    )
    parser.add_argument(
        "--cam", type=Path, metavar="DIR", help="also write a class activation picture a photo"
    )
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that runs a trained network."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="RUN_OR_FILE",
        help="run folder, checkpoint, or a .safetensors or .onnx file of train.export",
    )
    parser.add_argument(
        "--flips",
        action=argparse.BooleanOptionalAction,
        help="the mirrored photo counts too, or not (default: as the run was validated)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="photos a step (default: 32)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run; auto takes the GPU when there is one",
    )
    parser.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        default="auto",
        help="mixed precision; auto is bf16 where the machine has it in hardware",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: one a core)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def trained_from(arguments: argparse.Namespace) -> Trained:
    """The network that the flags of `add_model_arguments` name, ready to run."""
    if arguments.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {arguments.batch_size}")
    set_threads(arguments.threads)
    device = choose_device(arguments.device)
    return load_trained(arguments.checkpoint, device, choose_amp(arguments.amp, device))


def run(arguments: argparse.Namespace) -> None:
    """Predict and write. Raises DataError at the end where files were skipped."""
    photos, outputs = _sort_out(arguments)
    if not photos:
        raise UsageError("name at least one photo, or a folder of them")
    if arguments.top_k < 1:
        raise UsageError(f"--top-k must be at least 1, not {arguments.top_k}")
    files, lost = _files(photos)
    trained = trained_from(arguments)
    cams = None if arguments.cam is None else _CamWriter(trained, arguments.cam)
    found, started = [], time.perf_counter()
    width = min(60, max(map(len, files), default=0))
    with progress(len(files)) as bar:
        for one in predict(
            trained,
            files,
            lambda file, size: decode(Path(file), size),
            batch_size=arguments.batch_size,
            flips=arguments.flips,
        ):
            bar.update()
            if one.reason is not None:
                lost.append((one.name, one.reason))
                continue
            found.append(one)
            if cams is not None:
                cams.write(one)
            if not outputs:
                say = bar.write if sys.stderr.isatty() else print
                say(_row(trained, one, arguments.top_k, width))
    for kind, target in outputs.items():
        _write(target, FORMATS[kind](trained, found))
    _report(len(found), time.perf_counter() - started, lost)


def _sort_out(arguments: argparse.Namespace) -> tuple[list[Path], dict[str, str]]:
    """The photos, and the file of each format: `--json photo.jpg` names a photo, not the file."""
    photos, outputs = [Path(photo) for photo in arguments.photos], {}
    for kind in FORMATS:
        target = getattr(arguments, kind)
        if target is not None and target != STDOUT and Path(target).suffix.lower() != f".{kind}":
            photos.insert(0, Path(target))
            target = STDOUT
        if target is not None:
            outputs[kind] = target
    if list(outputs.values()).count(STDOUT) > 1:
        raise UsageError("--csv and --json both to the terminal: name a file for one of them")
    return photos, outputs


def _files(photos: Sequence[Path]) -> tuple[list[str], list[tuple[str, str]]]:
    """The photo files that the arguments stand for, and those that are not there."""
    files, lost = [], []
    for photo in photos:
        if photo.is_dir():
            below, _ = photo_files(photo)
            if not below:
                lost.append((str(photo), "a folder without photos"))
            files += [str(photo / name) for name in below]
        elif photo.exists():
            files.append(str(photo))
        else:
            lost.append((str(photo), "no such file or folder"))
    return files, lost


def _ranked(trained: Trained, one: Prediction) -> Iterator[tuple[str, float]]:
    for k in np.argsort(-one.probability, kind="stable"):
        yield trained.classes[k], float(one.probability[k])


def _row(trained: Trained, one: Prediction, top_k: int, width: int) -> str:
    classes = list(_ranked(trained, one))[:top_k]
    return f"{one.name:{width}}  " + "  ".join(f"{label} {p:.1%}" for label, p in classes)


def _as_json(trained: Trained, found: Sequence[Prediction]) -> str:
    items: list[dict[str, Any]] = []
    for one in found:
        ranked = list(_ranked(trained, one))
        label, probability = ranked[0]
        items.append(
            {
                "file": one.name,
                "label": label,
                "probability": probability,
                "probabilities": dict(zip(trained.classes, one.probability.tolist(), strict=True)),
            }
        )
    return json.dumps(items, indent=1, ensure_ascii=False) + "\n"


def _as_csv(trained: Trained, found: Sequence[Prediction]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "label", "probability", *trained.classes])
    for one in found:
        label, probability = next(_ranked(trained, one))
        numbers = (f"{p:.6f}" for p in (probability, *one.probability))
        writer.writerow([one.name, label, *numbers])
    return text.getvalue()


FORMATS: dict[str, Callable[[Trained, Sequence[Prediction]], str]] = {
    "csv": _as_csv,
    "json": _as_json,
}


def _write(target: str, text: str) -> None:
    if target == STDOUT:
        sys.stdout.write(text)
    else:
        write_atomically(Path(target), text.encode("utf-8", "replace"))


def _report(count: int, seconds: float, lost: Sequence[tuple[str, str]]) -> None:
    for path, reason in lost[:20]:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    print(
        f"{counted(count, 'photo')} in {seconds:.1f} s, {count / seconds:.1f} images/s",
        file=sys.stderr,
    )
    if lost:
        raise DataError(
            f"skipped {len(lost)} of {counted(count + len(lost), 'file')} (first {lost[0][0]}: "
            f"{lost[0][1]}): replace or leave them out"
        )


class _CamWriter:
    """Writes the photo and, beside it, what speaks for its class."""

    def __init__(self, trained: Trained, folder: Path):
        if trained.model is None:
            raise UsageError("--cam needs the network itself, not an ONNX file: name the run")
        self.trained, self.folder, self.taken = trained, folder, set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from error

    def write(self, one: Prediction) -> None:
        _, maps = activation_maps(self.trained.model, self.trained.images([one.square]))
        evidence = maps[0, int(one.probability.argmax())].cpu().numpy()
        both = np.concatenate([one.square, overlay(one.square, evidence)], axis=1)
        data = io.BytesIO()
        Image.fromarray(both).save(data, "PNG")
        write_atomically(self.folder / f"{self._name(Path(one.name))}.cam.png", data.getvalue())

    def _name(self, path: Path) -> str:
        """The photo's own name; photos of one name in several folders are numbered."""
        name, number = path.stem, 1
        while name in self.taken:
            number += 1
            name = f"{path.stem}-{number}"
        self.taken.add(name)
        return name


if __name__ == "__main__":
    sys.exit(main())
