"""A report that is written once and comes out twice: a page, and Markdown for where pages are not
read. Pictures lie beside the Markdown and are inlined in the page."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from train.files import write_atomically
from train.page import NoteKind, Page


class Document:
    """Collects what `Page` takes, for `report.html` and the file `markdown` in `folder`. Pictures
    are files of that folder or below, named relative to it."""

    def __init__(
        self, folder: Path, title: str, subtitle: str, markdown: str, language: str = "en"
    ) -> None:
        self._folder = folder
        self._markdown = markdown
        self._page = Page(title, subtitle, language)
        self._lines = [f"# {_safe(title)}\n", f"{_safe(subtitle)}\n"]

    def section(self, title: str) -> None:
        self._page.section(title)
        self._lines.append(f"## {_safe(title)}\n")

    def text(self, *paragraphs: str) -> None:
        self._page.text(*paragraphs)
        self._lines += [f"{_safe(words)}\n" for words in paragraphs]

    def note(self, kind: NoteKind, words: str) -> None:
        self._page.note(kind, words)
        self._lines.append(f"**{_safe(words)}**\n")

    def table(
        self, header: Sequence[str], rows: Iterable[Sequence[object]], caption: str = ""
    ) -> None:
        """A table of text; an empty cell is a dash on the page."""
        rows = list(rows)
        self._page.table(header, rows, caption)
        self._lines += [_line(header), _line(["---"] * len(header)), *map(_line, rows), ""]
        if caption:
            self._lines.append(f"{_safe(caption)}\n")

    def figure(self, name: str, image: bytes | None, caption: str, alt: str) -> None:
        """A plot, put into the folder as `name`, or None where it lies there already."""
        if image is not None:
            write_atomically(self._folder / name, image)
        self._page.figure(self._folder / name, caption, alt, plot=True)
        self._lines += [_picture(name, alt), f"{_safe(caption)}\n"]

    def gallery(self, pictures: Iterable[tuple[str, str, str]]) -> None:
        """Photos that lie in the folder side by side, each (name, caption, alt)."""
        pictures = list(pictures)
        self._page.gallery(
            ((self._folder / name).read_bytes(), caption, alt) for name, caption, alt in pictures
        )
        for name, caption, alt in pictures:
            self._lines += [_picture(name, alt), f"{_safe(caption)}\n"]

    def facts(self, facts: Mapping[str, str]) -> None:
        self._page.facts(facts)
        words = "; ".join(f"{name} {value}" for name, value in facts.items())
        self._lines.append(f"{_safe(words)}\n")

    def command(self, text: str) -> None:
        self._page.command(text)
        self._lines.append(f"```bash\n{text}\n```\n")

    def write(self) -> None:
        """Write both files. Raises DiskError when that cannot be done."""
        self._page.write(self._folder / "report.html")
        text = "\n".join(self._lines)
        write_atomically(self._folder / self._markdown, text.encode("utf-8", "replace"))


def _safe(text: object) -> str:
    """Names may come from anywhere; Markdown takes HTML for HTML."""
    return str(text).replace("<", "&lt;")


def _picture(name: str, alt: str) -> str:
    return f"![{_safe(alt)}]({name})\n"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(_safe(cell).replace("|", "/") for cell in cells) + " |"
