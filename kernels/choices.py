"""What was chosen where, among which rivals and by what times; and the rule that chooses."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import timing

KERNELS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Key:
    """What is chosen (in words, with its shapes) and all that the times depend on."""

    what: str
    dtype: str
    gpu: str
    multiprocessors: int
    driver: str
    torch: str
    triton: str
    cudnn: str
    source: str

    def same_site(self, other: "Key") -> bool:
        """Whether `other` is the same question on the same kind of GPU, versions aside."""
        return self.site == other.site

    @property
    def site(self) -> tuple[str, str, str, int]:
        """The question without the versions."""
        return self.what, self.dtype, self.gpu, self.multiprocessors


@dataclass(frozen=True)
class Rival:
    """A candidate's median and quartiles in microseconds, or why it was refused; neither where
    nothing was measured."""

    median_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    refused: str | None = None

    @property
    def spread_us(self) -> float:
        """The distance between the quartiles."""
        return self.high_us - self.low_us


@dataclass(frozen=True)
class Choice:
    """The winner among `rivals`, in the order they stood in, and the reason in one phrase."""

    key: Key
    winner: str
    baseline: str
    rivals: dict[str, Rival]
    reason: str

    def speedup(self, name: str) -> float | None:
        """How many times faster than the baseline rival `name` is; None where one has no time."""
        ours, base = (self.rivals[n].median_us for n in (name, self.baseline))
        return base / ours if ours and base else None

    def describe(self) -> str:
        """A paragraph for people: what, where, the winner, and a line for each rival."""
        key = self.key
        lines = [
            f"{key.what}, {key.dtype}, {key.gpu}: {self.winner} ({self.reason})",
            f"  {key.multiprocessors} multiprocessors, driver {key.driver}, torch {key.torch}, "
            f"triton {key.triton}, cuDNN {key.cudnn}, kernels {key.source}",
        ]
        width = max(map(len, self.rivals))
        for name, rival in self.rivals.items():
            mark = "*" if name == self.winner else " "
            line = f"{mark} {name:{width}}  "
            if rival.refused is not None:
                line += f"refused: {rival.refused}"
            elif rival.median_us is None:
                line += "not measured"
            else:
                line += f"{rival.median_us:9.1f} us ({rival.low_us:.1f} to {rival.high_us:.1f})"
                ratio = self.speedup(name)
                line += "" if ratio is None else f"  {ratio:5.2f}x"
            lines.append(line)
        return "\n".join(lines)


def key_for(
    what: str, dtype: torch.dtype, device: torch.device, sources: tuple[Path, ...] = ()
) -> Key:
    """The key of choosing `what` (name it with its shapes) for `dtype` on `device`.

    sources: files outside this package that define the candidates; a change of them, or of any
        file of this package, makes a new key.
    """
    place = timing.place(device)
    cuda = device.type == "cuda"
    searched = " with benchmark" if torch.backends.cudnn.benchmark else ""
    return Key(
        what=what,
        dtype=str(dtype).removeprefix("torch."),
        gpu=place["device"],
        multiprocessors=(
            torch.cuda.get_device_properties(device).multi_processor_count if cuda else 0
        ),
        driver=place["driver"],
        torch=place["torch"],
        triton=place["triton"],
        cudnn=place["cudnn"] + searched,
        source=source_hash((*sorted(KERNELS.glob("*.py")), *sources)),
    )


@functools.cache  # what this process runs is what it loaded, whatever happens to the files later
def source_hash(files: tuple[Path, ...]) -> str:
    """A hash of the names and contents of `files`."""
    digest = hashlib.sha256()
    for path in files:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()[:16]


def decide(rivals: dict[str, Rival], baseline: str) -> tuple[str, str]:
    """The name of the rival to take, and why: the fastest, if it beats the baseline by more than
    twice the wider of the two spreads; else the baseline. Of equals the first."""
    timed = {name: rival for name, rival in rivals.items() if rival.refused is None}
    if not timed:
        return baseline, "every candidate was refused"
    if baseline not in timed:
        return _fastest(timed), f"the baseline {baseline} was refused"
    base = timed.pop(baseline)
    faster = {
        name: rival
        for name, rival in timed.items()
        if base.median_us - rival.median_us > 2 * max(base.spread_us, rival.spread_us)
    }
    if not faster:
        return baseline, "none is faster than the baseline by more than twice the spread"
    best = _fastest(faster)
    return best, f"{base.median_us / faster[best].median_us:.2f}x faster than {baseline}"


def _fastest(timed: dict[str, Rival]) -> str:
    return min(timed, key=lambda name: timed[name].median_us)
