"""Every reader against damaged and foreign input: it reads, or refuses in a sentence.

    python -m tests.fuzz --inputs 100000 --seed 0 --out FILE.json

The inputs are mutations (`tests.mutations`) of good ones, dealt out among the readers of
`tests.fuzz_readers`; input N of a reader depends on (seed, reader, N) alone. Everything but a
result, a LapisError, or exit code 2 with a message, is a finding: another exception, a message of
several lines, an end of the process, more than MEMORY or SECONDS for one input, a connection, a
process started, and a file opened or changed outside of the folder that was given. FILE gets the
counts, seed, commit and duration.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.fuzz_readers import READERS, Reader, run_folder
from train.data.photos import UnreadablePhoto
from train.environment import versions
from train.errors import LapisError
from train.record import write_json

MEMORY = 2 * 2**30  # bytes of address space an input may take beyond what is loaded
SECONDS = 20
BLOCK = 500  # inputs a process
ROOT = Path(__file__).resolve().parents[1]
# what a reader may open besides its folder: the interpreter, libraries, and the system's own facts
SYSTEM = (sys.prefix, sys.base_prefix, str(ROOT), "/usr", "/etc/ld.so.cache", "/proc", "/sys")
FORBIDDEN = ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


class TooLong(BaseException):
    """No reader may catch it."""


class Guard:
    """Sees, while it is active, what the process opens, changes, starts and connects to."""

    def __init__(self, folder: Path):
        self.folder = os.path.realpath(folder)
        self.active, self.seen = False, []
        sys.addaudithook(self._look)

    def _look(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {args[:2]}")
        elif event == "open" and not isinstance(args[0], int):
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not self._inside(args[0]) and (writes or not self._of_system(args[0])):
                self.seen.append(f"opens {args[0]!r}")
        elif event in CHANGES and not self._inside(args[0]):
            self.seen.append(f"{event} {args[0]!r}")

    def _inside(self, path: Any) -> bool:
        return (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(self.folder + os.sep)

    def _of_system(self, path: Any) -> bool:
        real = os.path.realpath(os.fsdecode(path))
        return real == os.devnull or real.startswith(SYSTEM)


def outcome(reader: Reader, value: Any, guard: Guard) -> tuple[str, str]:
    """("read", ""), (the error's class, its message), or ("finding", what is wrong)."""

    def too_long(*_: object) -> None:
        raise TooLong

    said, guard.seen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace"), []
    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    guard.active = True
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            reader.read(value)
        ended, message = "read", ""
    except (LapisError, UnreadablePhoto) as error:
        ended, message = type(error).__name__, str(error)
        if not message or "\n" in message:
            return "finding", f"a message that is no sentence: {message!r}"
    except SystemExit as error:
        ended, message = "exit 2", str(error.code)
        said.flush()
        if error.code != 2 or not said.buffer.getvalue():
            return "finding", f"exit code {error.code}, or nothing said"
    except TooLong:
        return "finding", f"more than {SECONDS} seconds"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename]
        place = f"{ours[-1].filename.removeprefix(str(ROOT))}:{ours[-1].lineno}" if ours else ""
        return "finding", f"{type(error).__name__}: {error} ({place}, {where.name})"
    finally:
        guard.active = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ("finding", "; ".join(guard.seen)) if guard.seen else (ended, message)


def numbered(reader: Reader, seed: int, number: int) -> Any:
    """The input `number` of a reader."""
    return reader.mutate(random.Random(f"{seed} {reader.name} {number}"))


def block(reader: Reader, folder: Path, seed: int, numbers: range) -> dict[str, Any]:
    """What became of these inputs, tried in a fork that may die: counts by outcome, findings as
    [number, what], and the most memory in bytes."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        with os.fdopen(into, "w") as stream:
            for line in _lines(reader, folder, seed, numbers):
                stream.write(json.dumps(line) + "\n")
                stream.flush()
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as stream:
        lines = [json.loads(line) for line in stream]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    counts = collections.Counter(ended for ended, _ in lines)
    findings = [
        [number, what]
        for number, (ended, what) in zip(numbers, lines, strict=False)
        if ended == "finding"
    ]
    if len(lines) < len(numbers):  # and go on behind the input that ended it
        last = numbers[len(lines)]
        counts["finding"] += 1
        findings.append([last, f"the process ended with {code}"])
        rest = block(reader, folder, seed, range(last + 1, numbers.stop))
        counts.update(rest["counts"])
        findings += rest["findings"]
    return {"counts": counts, "findings": findings}


def _lines(reader: Reader, folder: Path, seed: int, numbers: range) -> Iterator[tuple[str, str]]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    loaded = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (loaded + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(folder)
    guard = Guard(folder)
    for number in numbers:
        ended, message = outcome(reader, numbered(reader, seed, number), guard)
        yield ended, message if ended == "finding" else ""


def fuzz(inputs: int, seed: int, folder: Path, readers: Sequence[str] = ()) -> dict[str, Any]:
    """Deal `inputs` out among the readers, or those named; what FILE gets."""
    began, found = time.time(), {}
    os.environ["LAPIS_CACHE"], tempfile.tempdir = str(folder / "cache"), str(folder)
    chosen = {name: share for name, share in READERS.items() if not readers or name in readers}
    run = run_folder(folder / "run")
    for name, (share, make) in chosen.items():
        place = folder / name
        place.mkdir()
        reader = make(place, run)
        count = max(1, round(inputs * share / sum(share for share, _ in chosen.values())))
        total = {"counts": collections.Counter(), "findings": []}
        for first in range(0, count, BLOCK):
            part = block(reader, folder, seed, range(first, min(first + BLOCK, count)))
            total["counts"].update(part["counts"])
            total["findings"] += part["findings"]
        found[name] = total
        counts = ", ".join(f"{count:,} {ended}" for ended, count in sorted(total["counts"].items()))
        print(f"{name}: {counts}", flush=True)
        for number, what in total["findings"][:20]:
            print(f"    {number}: {what[:300]}", flush=True)
    return {
        "seed": seed,
        "inputs": sum(sum(one["counts"].values()) for one in found.values()),
        "findings": sum(len(one["findings"]) for one in found.values()),
        "seconds": round(time.time() - began),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        "versions": versions(),
        "readers": {name: {**one, "inputs": one["counts"].total()} for name, one in found.items()},
    }


def main() -> int:
    """Try as the flags say; exit code 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the counts as JSON")
    parser.add_argument("--reader", action="append", choices=tuple(READERS), default=[])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(options.inputs, options.seed, Path(folder), options.reader)
    if options.out:
        write_json(options.out, found)
    print(f"{found['inputs']:,} inputs, {found['findings']} findings, {found['seconds']} s")
    return 1 if found["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
