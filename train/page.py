"""The one builder of self-contained HTML pages: every report is sections handed to it.

A page is one file: no script, no request, images inlined, all text escaped. It follows the
reader's dark or light setting, scrolls wide tables on a phone and prints cleanly.
"""

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from train.files import write_atomically
from train.style import CSS

# Nothing may be fetched: the page's own style and inlined images are all a browser will load.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
SHRINKABLE = 640  # CSS pixels; a wider plot keeps its width and scrolls on a narrow screen
CONTENTS_FROM = 4  # a page with this many sections gets a line of links to them
NUMBER = re.compile(r"[-+\u2212]?[\d.,]+(e[-+]?\d+)?([ \u00a0]?(%|x|s|ms|µs|h|GB|MB|KB|points))?")

NoteKind = Literal["good", "info", "warn", "bad"]


class Page:
    """Collects sections, then writes one HTML file.

    Strings may come from anywhere (class names, file names, messages): they are escaped here and
    nowhere else. In `text`, `note` and captions, `` `words` `` in backticks are set as code.
    """

    def __init__(self, title: str, subtitle: str = "", language: str = "en") -> None:
        self.title = title
        self.subtitle = subtitle
        self.language = language
        self._sections: list[str] = []
        self._body: list[str] = []

    def section(self, title: str) -> None:
        """Start a section; what follows belongs to it."""
        self._sections.append(title)
        self._body.append(f'<h2 id="section-{len(self._sections)}">{escape(title)}</h2>')

    def text(self, *paragraphs: str) -> None:
        """Add a paragraph for every argument."""
        self._body.extend(f"<p>{_prose(paragraph)}</p>" for paragraph in paragraphs)

    def note(self, kind: NoteKind, text: str) -> None:
        """Add a verdict box. `kind` is "good", "info", "warn" or "bad"."""
        if kind not in ("good", "info", "warn", "bad"):
            raise ValueError(f"note kind {kind!r} is none of good, info, warn, bad")
        self._body.append(f'<p class="note {kind}" role="note">{_prose(text)}</p>')

    def facts(self, facts: Mapping[str, object]) -> None:
        """Add names with their values, as a grid that fits the screen."""
        pairs = (
            f"<div><dt>{escape(name)}</dt><dd>{escape(_value(value))}</dd></div>"
            for name, value in facts.items()
        )
        self._body.append(f'<dl class="facts">{"".join(pairs)}</dl>')

    def table(
        self, header: Sequence[str], rows: Iterable[Sequence[object]], caption: str = ""
    ) -> None:
        """Add a table; a column of numbers is set flush right.

        Raises `ValueError` when a row has not as many cells as the header.
        """
        cells = [[_value(cell) for cell in row] for row in rows]
        for number, row in enumerate(cells, start=1):
            if len(row) != len(header):
                raise ValueError(
                    f"table row {number} has {len(row)} cells, the header {len(header)}"
                )
        numeric = [_is_numeric([row[column] for row in cells]) for column in range(len(header))]
        head = _row("th", header, numeric)
        body = "".join(_row("td", row, numeric) for row in cells)
        below = f"<figcaption>{_prose(caption)}</figcaption>" if caption else ""
        self._body.append(
            '<figure class="table"><div class="scroll" tabindex="0">'
            f"<table><thead>{head}</thead><tbody>{body}</tbody></table></div>{below}</figure>"
        )

    def figure(
        self, image: Path | str | bytes, caption: str, alt: str, *, plot: bool = False
    ) -> None:
        """Add a picture (PNG, JPEG, WEBP or GIF; a path or the bytes themselves).

        A photo fits the column and keeps its colours. A `plot` (dark ink on white) is shown at the
        size its resolution asks for and turns light on dark for a reader in the dark.
        Raises `OSError` when the file cannot be read or is no picture.
        """
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        source, size, wide = _inline(data, physical=plot)
        classes = ("plot" if plot else "photo") + (" wide" if wide else "")
        self._body.append(
            f'<figure class="{classes}"><div class="scroll" tabindex="0">'
            f'<img src="{source}" {size} alt="{escape(alt)}"></div>'
            f"<figcaption>{_prose(caption)}</figcaption></figure>"
        )

    def gallery(self, pictures: Iterable[tuple[bytes, str, str]]) -> None:
        """Add photos side by side, each (PNG, JPEG, WEBP or GIF, caption, alt)."""
        items = []
        for data, caption, alt in pictures:
            source, size, _ = _inline(data, physical=False)
            items.append(
                f'<figure class="photo"><img src="{source}" {size} alt="{escape(alt)}">'
                f"<figcaption>{_prose(caption)}</figcaption></figure>"
            )
        self._body.append(f'<div class="gallery">{"".join(items)}</div>')

    def command(self, text: str) -> None:
        """Add a shell command or other literal lines; one click selects all of it."""
        self._body.append(f'<pre class="scroll" tabindex="0"><code>{escape(text)}</code></pre>')

    def html(self) -> str:
        """The whole document."""
        subtitle = f"<p>{_prose(self.subtitle)}</p>" if self.subtitle else ""
        return (
            f'<!doctype html>\n<html lang="{escape(self.language)}">\n<head>\n'
            '<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n"
            f"<header><h1>{escape(self.title)}</h1>{subtitle}{self._contents()}</header>\n<main>\n"
            + "\n".join(self._body)
            + "\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: Path | str) -> None:
        """Write the page to `path` in one step. Raises `DiskError` when that cannot be done."""
        write_atomically(Path(path), self.html().encode("utf-8"))

    def _contents(self) -> str:
        if len(self._sections) < CONTENTS_FROM:
            return ""
        links = (
            f'<a href="#section-{number}">{escape(title)}</a>'
            for number, title in enumerate(self._sections, start=1)
        )
        return f'<nav aria-label="Contents">{" ".join(links)}</nav>'


def percent(share: float) -> str:
    """A fraction 0..1 as a percentage with one decimal; the sign never starts a line."""
    return f"{100 * share:.1f}\u00a0%"


def escape(text: object) -> str:
    """`text` as HTML text or attribute; undecodable bytes of a file name become `?`."""
    clean = str(text).encode("utf-8", "replace").decode("utf-8").replace("\0", "?")
    return html.escape(clean, quote=True)


def _prose(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _value(value: object) -> str:
    """A cell as text: four significant digits for floats, a dash for what is not there."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "\u2013"
    return str(value)


def _is_numeric(column: Sequence[str]) -> bool:
    filled = [cell for cell in column if cell != "\u2013"]
    return bool(filled) and all(NUMBER.fullmatch(cell) for cell in filled)


def _row(tag: str, cells: Sequence[str], numeric: Sequence[bool]) -> str:
    scope = ' scope="col"' if tag == "th" else ""
    return (
        "<tr>"
        + "".join(
            f"<{tag}{scope}{' class=number' if right else ''}>{escape(cell)}</{tag}>"
            for cell, right in zip(cells, numeric, strict=True)
        )
        + "</tr>"
    )


def _inline(data: bytes, *, physical: bool) -> tuple[str, str, bool]:
    """A picture's data URI, its size attributes in CSS pixels, and whether it needs to scroll."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF")) as picture:
        width, height = picture.size
        mime = Image.MIME[picture.format]
        scale = 96 / picture.info.get("dpi", (96, 96))[0] if physical else 1.0
    width, height = round(width * scale), round(height * scale)
    source = f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"
    return source, f'width="{width}" height="{height}"', physical and width > SHRINKABLE
