"""The files choices are remembered in.

The user's, `plans.json` in `cache_dir()`, is replaced whole (written beside it, flushed, renamed)
under a lock file, so no reader meets half of it and two processes lose nothing. Windows has no such
lock: there the later of two that write at once wins, and what is lost is measured again.

`kernels/selected/*.json` are files of the same form for GPUs the project has measured, only read by
others: `ship` writes them. An entry there is valid for the versions and sources it names.
"""

import contextlib
import functools
import json
import os
import re
import secrets
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

from kernels.choices import Choice, Key, Rival

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1
MOST_CHOICES = 2000  # the oldest go: every change of a kernel leaves its entries behind
SHIPPED = Path(__file__).resolve().parent / "selected"


def cache_dir() -> Path:
    """$LAPIS_CACHE, else the folder for caches of this system."""
    if given := os.environ.get("LAPIS_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "lapis/cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/lapis"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "lapis"


class Store:
    """The choices of this process: those of the user's file in `folder`, its own, and the shipped.

    A file that cannot be used is set aside with a warning, a folder that cannot be written costs a
    warning and the memory of the next process; neither stops anything.
    """

    def __init__(self, folder: Path, shipped: Path = SHIPPED):
        self.path = folder / "plans.json"
        self._shipped_folder = shipped
        self._unwritable = False
        self.announced: set[str] = set()  # GPUs of which this process has said that it measures

    @functools.cached_property
    def _known(self) -> dict[Key, Choice]:
        return self.read()

    @functools.cached_property
    def shipped(self) -> dict[Path, list[Choice]]:
        """The shipped tables."""
        tables = {}
        for path in sorted(self._shipped_folder.glob("*.json")):
            try:
                tables[path] = list(_read(path).values())
            except (OSError, ValueError) as error:
                warnings.warn(f"{path} is not used: {error}.", stacklevel=2)
        return tables

    def find(self, key: Key) -> Choice | None:
        """The choice for `key`: the user's or this process's, else a shipped one whose key differs
        in nothing but the driver."""
        if found := self._known.get(key):
            return found
        everywhere = chain.from_iterable(self.shipped.values())
        return next((c for c in everywhere if replace(c.key, driver=key.driver) == key), None)

    def find_shipped(self, key: Key) -> Choice | None:
        """The shipped choice for the site of `key`, whatever versions it was measured with."""
        everywhere = chain.from_iterable(self.shipped.values())
        return next((c for c in everywhere if c.key.same_site(key)), None)

    def add(self, choice: Choice, keep: bool = True) -> None:
        """Remember `choice` in this process and, with `keep`, in the user's file."""
        self._known[choice.key] = choice
        if not keep:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                choices = self._read_or_set_aside()
                choices.pop(choice.key, None)  # so that it becomes the newest
                choices[choice.key] = choice
                _write(self.path, list(choices.values())[-MOST_CHOICES:])
        except OSError as error:
            if not self._unwritable:
                warnings.warn(
                    f"{self.path} cannot be written ({error.strerror or error}): plans are "
                    "measured again next time; set LAPIS_CACHE to a writable folder.",
                    stacklevel=2,
                )
            self._unwritable = True

    def ship(self, gpu: str) -> tuple[Path, int]:
        """Write the newest of the user's choices for every site on `gpu` into its shipped table, in
        place of the table's own; returns the table and how many choices it holds.

        Raises LookupError where the user's file has none for this GPU, OSError or ValueError where
        the table cannot be written or, being damaged, read.
        """
        mine = [choice for choice in self.read().values() if choice.key.gpu == gpu]
        if not mine:
            raise LookupError(gpu)
        name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        path = self._shipped_folder / f"{name}.json"
        known = list(_read(path).values()) if path.exists() else []
        newest = {choice.key.site: choice for choice in [*known, *mine]}
        path.parent.mkdir(exist_ok=True)
        _write(path, list(newest.values()))
        return path, len(newest)

    def read(self) -> dict[Key, Choice]:
        """The choices now in the user's file, oldest first; none if it cannot be used, which sets
        it aside."""
        try:
            return _read(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError):
            with _locked(self.path):
                return self._read_or_set_aside()

    def _read_or_set_aside(self) -> dict[Key, Choice]:
        # under the lock: another process may have mended the file meanwhile
        try:
            return _read(self.path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            reason = str(error)
        aside = self.path.with_suffix(".json.unusable")
        try:
            os.replace(self.path, aside)
            reason += f"; it is now {aside.name}"
        except OSError:
            pass  # a folder that cannot be written: `add` will say so
        warnings.warn(f"{self.path} is not used: {reason}; plans are measured again.", stacklevel=3)
        return {}


@functools.cache
def user_store(folder: Path) -> Store:
    """The one store of this process for `folder`."""
    return Store(folder)


def _read(path: Path) -> dict[Key, Choice]:
    """The choices in a file, oldest first. Raises OSError, or ValueError saying what is wrong."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError("it is damaged") from error
    if isinstance(document, dict) and document.get("crc32", _crc32(document)) != _crc32(document):
        raise ValueError("its checksum does not fit")
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ValueError(f"its format is {found}, not {FORMAT}")
    try:
        choices = [_choice(entry) for entry in document["choices"]]
        return {choice.key: choice for choice in choices}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("an entry is malformed") from error


def _choice(entry: dict) -> Choice:
    rivals = {name: Rival(**fields) for name, fields in entry["rivals"].items()}
    choice = Choice(**{**entry, "key": Key(**entry["key"]), "rivals": rivals})
    for rival in (rivals[choice.winner], rivals[choice.baseline], *rivals.values()):
        times = (rival.median_us, rival.low_us, rival.high_us)
        if rival.refused is None and not all(isinstance(us, int | float) for us in times):
            raise TypeError("a rival has neither times nor a refusal")
    return choice


def _crc32(document: dict) -> str:
    """A checksum of the choices; tables that were shipped without one are taken as they are."""
    return f"{zlib.crc32(json.dumps(document.get('choices')).encode()):08x}"


def _write(path: Path, choices: list[Choice]) -> None:
    document = {"format": FORMAT, "choices": [asdict(choice) for choice in choices]}
    document["crc32"] = _crc32(document)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("x", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file of `path`; without one where there are no locks or none can be made."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                file = stack.enter_context(path.with_suffix(".lock").open("a"))
                fcntl.flock(file, fcntl.LOCK_EX)  # the system gives it back, even after a kill
        yield
