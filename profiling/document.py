"""A report that is written once and comes out twice: a page, and Markdown for where pages are not
read. Pictures lie beside the Markdown and are inlined in the page."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from train.files import write_atomically
from train.page import NoteKind, Page


class Document:
    """Collects sections, tables and pictures for `report.html` and `summary.md` in `folder`."""

    def __init__(self, folder: Path, title: str, subtitle: str) -> None:
        self._folder = folder
        self._page = Page(title, subtitle)
        self._lines = [f"# {title}\n", f"{subtitle}\n"]

    def section(self, title: str) -> None:
        self._page.section(title)
        self._lines.append(f"## {title}\n")

    def text(self, words: str) -> None:
        self._page.text(words)
        self._lines.append(f"{words}\n")

    def note(self, kind: NoteKind, words: str) -> None:
        self._page.note(kind, words)
        self._lines.append(f"**{words}**\n")

    def table(
        self, header: Sequence[str], rows: Iterable[Sequence[object]], caption: str = ""
    ) -> None:
        """A table of text; an empty cell is a dash on the page."""
        rows = list(rows)
        self._page.table(header, rows, caption)
        self._lines += [_line(header), _line(["---"] * len(header)), *map(_line, rows), ""]
        if caption:
            self._lines.append(f"{caption}\n")

    def figure(self, name: str, image: bytes, caption: str, alt: str) -> None:
        """A plot, put into the folder as `name`."""
        write_atomically(self._folder / name, image)
        self._page.figure(image, caption, alt, plot=True)
        self._lines += [f"![{alt}]({name})\n", f"{caption}\n"]

    def facts(self, facts: dict[str, str]) -> None:
        self._page.facts(facts)
        self._lines.append("; ".join(f"{name} {value}" for name, value in facts.items()) + "\n")

    def command(self, text: str) -> None:
        self._page.command(text)
        self._lines.append(f"```bash\n{text}\n```\n")

    def write(self) -> None:
        """Write both files. Raises DiskError when that cannot be done."""
        self._page.write(self._folder / "report.html")
        write_atomically(self._folder / "summary.md", "\n".join(self._lines).encode())


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"
