"""What is wrong with a folder of photos: `python -m train.data.check PATH [--labels] [--out DIR]`.

The findings go to the terminal, a line each with its cure; to `check.json`, which names all files;
and to `check.html`, with thumbnails. The photos themselves are never changed.
"""

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from train.arguments import flowing
from train.command import run_command
from train.data import open_photos
from train.data.check_page import LEVELS, write_page
from train.data.examine import Examined, examine
from train.data.findings import Finding, counted, findings, unusable
from train.data.relabel import COLUMNS
from train.errors import DataError
from train.files import unwritable, write_atomically


@flowing
@dataclass(frozen=True)
class Options:
    """What to check, and where the report goes."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """A folder with train.csv + train/, a folder per class, or food101:PATH."""
    labels: bool = False
    """Also look for wrong labels and photos of none of the classes, by what all other pictures of
    the folder look like: seconds for a thousand photos. They go to suspects.csv with the label that
    fits better, an empty one for none. Review it beside check.html before it is used: delete the
    rows whose photo is labelled right, correct those that suggest a wrong class, leave the label
    empty to drop the photo; then train with --relabel suspects.csv."""
    out: Path | None = None
    """Folder for the reports (default: runs/check-NAME)."""
    debug: bool = False
    """Show a traceback with errors."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check as the flags say; returns the exit code: 3 where the photos cannot be trained on."""
    options = tyro.cli(Options, prog="python -m train.data.check", description=__doc__, args=argv)
    return run_command(
        lambda: check(options.data, options.out, labels=options.labels),
        debug=options.debug,
        interrupted="interrupted; nothing was written",
    )


def check(data: str, out: Path | None = None, *, labels: bool = False) -> Examined:
    """Examine the photos `data` names, print the findings and write the reports to `out`.

    Raises DataError for photos nothing can be trained on (after the reports are written) and
    DiskError where they cannot be written.
    """
    photos = open_photos(data)
    out = out or Path("runs") / f"check-{photos.name}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from error
    examined = examine(photos, labels=labels)
    found = findings(examined)
    print(table(examined, found))
    document = json.dumps(as_json(examined), indent=1, ensure_ascii=False) + "\n"
    write_atomically(out / "check.json", document.encode())
    write_page(examined, found, out / "check.html")
    print(f"thumbnails: {out / 'check.html'}, all names: {out / 'check.json'}")
    if labels:
        _write_suspects(out / "suspects.csv", suspects_csv(examined))
    if reason := unusable(examined):
        raise DataError(reason)
    return examined


def _write_suspects(path: Path, content: bytes) -> None:
    """Write the list, unless it would take the place of one that somebody has reviewed."""
    if path.exists() and path.read_bytes() != content:
        print(f"{path} is kept: it may be reviewed; delete it to have the new list")
        return
    write_atomically(path, content)
    print(f"to review, then --relabel: {path} (--help says how)")


def table(examined: Examined, found: Sequence[Finding]) -> str:
    """The findings as lines of text."""
    photos, counts = examined.photos, examined.counts()
    classes = ", ".join(f"{label} {n:,}" for label, n in counts.items())
    lines = [f"{photos.name}: {counted(len(photos), 'photo')} of {len(counts)} classes ({classes})"]
    for finding in found:
        files = ", ".join(finding.files[:3]) + (", ..." if len(finding.files) > 3 else "")
        what = f"{finding.what}: {len(finding.files):,} ({files})" if files else finding.what
        lines.append(f"{LEVELS[finding.kind]:8} {what}; {finding.cure}")
    if not found:
        lines.append("nothing is wrong with these photos")
    return "\n".join(map(_printable, lines))


def _printable(line: str) -> str:
    """File names may hold what moves a terminal's cursor."""
    line = line.replace("\u00a0", " ")
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def as_json(examined: Examined) -> dict[str, Any]:
    """What check.json holds. Groups are lists of file names; a group of near duplicates includes
    the identical copies of its photos."""
    names = examined.photos.files
    return {
        "images": len(examined.photos),
        "classes": examined.counts(),
        "exact_duplicate_groups": [[names[i] for i in group] for group in examined.exact],
        "near_duplicate_groups": [[names[i] for i in group] for group in examined.near],
        "conflicting_labels": [
            [{"file": names[i], "label": examined.label(i)} for i in group]
            for group in examined.conflicts
        ],
        "unreadable": [{"file": file, "reason": reason} for file, reason in examined.unreadable],
        "suspect_labels": [
            {
                "file": names[suspect.photo],
                "label": examined.label(suspect.photo),
                "suggested": suspect.suggested,
                "score": suspect.score,
            }
            for suspect in examined.suspects
        ],
    }


def suspects_csv(examined: Examined) -> bytes:
    """The suspects as --relabel reads them: filename, and the suggested label, empty to drop it."""
    rows = [(examined.photos.files[s.photo], s.suggested) for s in examined.suspects]
    spaced = any(cell != cell.strip() for row in rows for cell in row)  # kept only within quotes
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL if spaced else csv.QUOTE_MINIMAL)
    writer.writerows([COLUMNS, *rows])
    return text.getvalue().encode()


if __name__ == "__main__":
    sys.exit(main())
