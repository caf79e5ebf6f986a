"""How good a trained network is on labelled photos: `python -m train.evaluate --checkpoint RUN
--data PATH`; without --data, on those the run was validated on.

Prints accuracy with its interval and a line a class, and writes a page with the confusion matrix,
the calibration curve and the worst mistakes. Photos with a twin among those the network was trained
on are counted: their accuracy is memory.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from train.arguments import Parser
from train.command import run_command
from train.data import open_photos
from train.data.findings import counted
from train.errors import DataError
from train.evaluate_page import write_page
from train.evaluation import Evaluation, evaluate, validation_photos
from train.files import unwritable, write_atomically
from train.predict import STDOUT, add_model_arguments, trained_from


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the flags say; returns the exit code."""
    parser = Parser("train.evaluate", __doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        help="a folder with train.csv + train/, a folder per class, food101:PATH or synthetic "
        "(default: the photos on which the run in the folder --checkpoint was validated)",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="all figures as JSON, to the terminal without a file name",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of evaluation.html (default: runs/evaluate-NAME)"
    )
    arguments = parser.parse_args(argv)
    return run_command(
        lambda: run(arguments),
        debug=arguments.debug,
        interrupted="interrupted; nothing was written",
        no_memory="lower --batch-size",
    )


def run(arguments: argparse.Namespace) -> Evaluation:
    """Evaluate, print, and write the page. Raises DataError where files were skipped."""
    trained = trained_from(arguments)
    own = arguments.data is None
    photos = validation_photos(arguments.checkpoint) if own else open_photos(arguments.data)
    out = arguments.out or Path("runs") / f"evaluate-{photos.name}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from error
    found = evaluate(trained, photos, batch_size=arguments.batch_size, flips=arguments.flips)
    if arguments.json != STDOUT:
        print(table(found))
        if own:
            print("the best epoch was chosen on these photos: fresh ones may do a little worse")
    if arguments.json is not None:
        text = json.dumps(found.as_json(), indent=1, ensure_ascii=False) + "\n"
        if arguments.json == STDOUT:
            sys.stdout.write(text)
        else:
            write_atomically(Path(arguments.json), text.encode())
    write_page(found, out)
    print(f"page: {out / 'evaluation.html'}", file=sys.stderr)
    if found.skipped:
        file, reason = found.skipped[0]
        raise DataError(
            f"{counted(len(found.skipped), 'file')} skipped (first {file}: {reason}): "
            "replace or leave them out"
        )
    return found


def table(found: Evaluation) -> str:
    """The figures as lines of text."""
    scores, classes = found.scores(), found.trained.classes
    low, high = scores.accuracy_interval
    width = max(5, *map(len, classes))
    lines = [
        f"{found.data}: {scores.images} photos, accuracy {scores.accuracy:.1%} "
        f"(95 % interval {low:.1%} to {high:.1%}), loss {scores.loss:.4f}, macro F1 "
        f"{scores.macro_f1:.3f}, calibration error {scores.calibration_error:.1%}",
        f"{'class':{width}}  images  precision  recall     F1    AUC  (95 % interval)",
    ]
    for label, one in zip(classes, scores.per_class, strict=True):
        shares = "".join(
            f"{'-' if value is None else f'{value:.1%}':>{size}}"
            for value, size in ((one.precision, 11), (one.recall, 8))
        )
        f1 = "-" if one.f1 is None else f"{one.f1:.3f}"
        auc = "-"
        if one.auc is not None:
            auc = f"{one.auc:.3f}  ({one.auc_interval[0]:.3f} to {one.auc_interval[1]:.3f})"
        lines.append(f"{label:{width}}  {one.images:6}{shares}  {f1:>5}  {auc}")
    twins = found.twin_figures()
    if twins is not None and twins["images"]:
        known = f"{twins['images']} photos ({twins['share']:.0%})"
        fresh = twins["accuracy_without"]
        lines.append(
            f"warning: {known} show a picture the network was trained on; without them the "
            f"accuracy is {'unknown' if fresh is None else f'{fresh:.1%}'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
