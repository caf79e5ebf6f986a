"""Pages: escaped, self-contained, dark and light, and without complaint in a real browser."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.errors import DiskError
from train.page import Page, escape

HOSTILE = '<img src=x onerror="alert(1)">&\'</style></script>'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


class Tags(HTMLParser):
    """Start tags with attributes, the visible text, and whether every tag was closed in order."""

    VOID = frozenset({"meta", "link", "img"})

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 20), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, "teal").save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def hostile_page() -> Page:
    page = Page(HOSTILE, HOSTILE)
    for number in range(4):
        page.section(f"{HOSTILE} {number}")
    page.text(HOSTILE, f"run `{HOSTILE}` now")
    page.note("warn", HOSTILE)
    page.facts({HOSTILE: HOSTILE, "missing": None})
    page.table((HOSTILE, "photos"), [(HOSTILE, 3), ("b", 1234)], HOSTILE)
    page.figure(picture(), HOSTILE, HOSTILE)
    page.command(f"rm '{HOSTILE}'")
    return page


def test_hostile_text_stays_text():
    document = hostile_page().html()
    found = Tags(document)
    assert found.open == []
    assert not {tag for tag, _ in found.tags} & {"script", "iframe", "object"}
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 1
    assert images[0]["alt"] == HOSTILE
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    # title, h1, subtitle, 4 contents, 4 headings, 2 texts, note, name and value, header, cell,
    # caption, figure caption, command
    assert "".join(found.words).count(HOSTILE) == 21


@given(st.text(alphabet=st.characters(codec=None)))
def test_any_text_survives_escaping(text):
    escaped = escape(text)
    assert not set(escaped) & set("<>\"'\0")
    found = Tags(f"<p>{escaped}</p>")
    assert [tag for tag, _ in found.tags] == ["p"]
    expected = text.encode("utf-8", "replace").decode().replace("\0", "?")
    assert "".join(found.words) == expected


def test_nothing_is_requested_and_the_policy_forbids_it():
    document = hostile_page().html()
    found = Tags(document)
    for tag, attributes in found.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
    style = re.search(r"<style>(.*?)</style>", document, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    policies = [
        attributes["content"]
        for _, attributes in found.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_dark_light_phone_and_print():
    document = Page("t").html()
    assert "@media (prefers-color-scheme: dark)" in document
    assert "@media print" in document
    assert '<meta name="color-scheme" content="light dark">' in document
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in document


def test_every_colour_has_a_dark_twin():
    document = Page("t").html()
    light, dark = re.findall(r":root \{(.*?)\}", document, re.DOTALL)[:2]
    names = set(re.findall(r"(--\w+): #", light))
    assert names
    assert names == set(re.findall(r"(--\w+): #", dark))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_figure_inlines_the_exact_bytes(kind):
    data = picture(format=kind)
    page = Page("t")
    page.figure(data, "a caption", "what it shows")
    (image,) = [attributes for tag, attributes in Tags(page.html()).tags if tag == "img"]
    head, _, body = image["src"].partition(",")
    assert head == f"data:image/{kind.lower()};base64"
    assert base64.b64decode(body) == data
    assert (image["width"], image["height"]) == ("40", "20")


def test_a_plot_has_its_physical_size_and_scrolls_when_wide(tmp_path):
    path = tmp_path / "plot.png"
    path.write_bytes(picture(size=(1600, 400), dpi=(192, 192)))
    page = Page("t")
    page.figure(path, "", "plot", plot=True)
    page.figure(picture(size=(600, 400), dpi=(192, 192)), "", "small", plot=True)
    found = Tags(page.html()).tags
    assert [a["width"] for tag, a in found if tag == "img"] == ["800", "300"]
    assert [a["class"] for tag, a in found if tag == "figure"] == ["plot wide", "plot"]


def test_a_figure_that_is_no_picture_is_refused():
    with pytest.raises(OSError, match="cannot identify image"):
        Page("t").figure(b"<svg onload=alert(1)>", "", "")


def test_table_formats_and_aligns():
    page = Page("t")
    page.table(
        ("name", "count", "share", "loss"),
        [("a", 12345, "3.1 %", 0.123456), ("7", None, "50 %", float("nan"))],
    )
    found = Tags(page.html())
    classes = [attributes.get("class") for tag, attributes in found.tags if tag == "td"]
    assert classes == [None, "number", "number", "number"] * 2
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page.html())
    assert cells == ["a", "12,345", "3.1 %", "0.1235", "7", "\u2013", "50 %", "\u2013"]


def test_mistakes_of_the_caller_are_named():
    page = Page("t")
    with pytest.raises(ValueError, match="row 2 has 1 cells, the header 2"):
        page.table(("a", "b"), [(1, 2), (3,)])
    with pytest.raises(ValueError, match="'fine' is none of good"):
        page.note("fine", "x")


def test_contents_only_for_long_pages():
    short, long = Page("t"), Page("t")
    for number in range(4):
        long.section(f"s{number}")
        if number < 3:
            short.section(f"s{number}")
    assert "<nav" not in short.html()
    targets = re.findall(r'href="#([^"]+)"', long.html())
    assert targets == re.findall(r'<h2 id="([^"]+)"', long.html())
    assert len(targets) == 4


def test_write_replaces_in_one_step_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    page = Page("neu", "Grüße \udcff")
    page.write(path)
    assert path.read_text(encoding="utf-8") == page.html()
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(DiskError, match=r"missing/report\.html"):
        page.write(tmp_path / "missing" / "report.html")


def console(path) -> list[str]:
    """What a headless browser prints to its console while it opens the page."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={path.parent / 'profile'}", "--dump-dom", path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "</html>" in result.stdout
    return [line for line in result.stderr.splitlines() if "CONSOLE" in line]


if BROWSER:

    def test_a_browser_has_nothing_to_complain_about(tmp_path):
        page = tmp_path / "page.html"
        hostile_page().write(page)
        assert console(page) == []
        # The control: a page that asks for something is heard, so silence above means something.
        broken = tmp_path / "broken.html"
        broken.write_text(page.read_text().replace("<main>", '<main><img src="nothing.png">'))
        assert any("Content Security Policy" in line for line in console(broken))
