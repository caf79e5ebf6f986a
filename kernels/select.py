"""The fastest of several implementations of one thing, found by measuring, and remembered:

    python -m kernels.select --show [--json]    every remembered choice with its rivals' times
    python -m kernels.select --clear            forget the user's choices
    python -m kernels.select --ship             write those for this GPU into the checkout's table

A candidate counts only when its numbers hold for the very configuration that is asked for; one that
raises, runs out of memory, does not compile or cannot be captured in a CUDA graph is refused with
the reason. Sound ones take turns in CUDA graphs over inputs that pass three times the L2. The
fastest wins if it beats the baseline by more than twice the spread (the wider of the two distances
between quartiles); otherwise the baseline stays, so noise never chooses.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from kernels import timing
from kernels.choices import Choice, Key, Rival, decide
from kernels.store import Store, cache_dir, user_store

ROUNDS = 21
OUT_OF_MEMORY = "out of memory"
Timer = Callable[[Mapping[str, Sequence[timing.Call]], torch.device], Mapping[str, Rival]]


@dataclass(frozen=True)
class Job:
    """One thing to be chosen.

    candidates: name -> run(inputs) -> outputs, called many times on the same inputs while it is
        timed; of two that are equally fast the first wins.
    baseline: the name of the candidate that stays unless another is clearly faster.
    make_inputs: i -> fresh inputs, tensors in any nesting of lists, tuples and dicts, drawn at
        random; the same i gives the same values.
    check: (name, outputs of make_inputs(0)) -> None if they agree with the truth in float64, else
        why not, in one phrase. Memory that a candidate allocates and never writes holds NaN.
    """

    key: Key
    candidates: Mapping[str, Callable[[Any], Any]]
    baseline: str
    make_inputs: Callable[[int], Any]
    check: Callable[[str, Any], str | None]

    def __post_init__(self) -> None:
        if self.baseline not in self.candidates:
            raise ValueError(
                f"{self.key.what}: the baseline {self.baseline} is none of the candidates "
                f"{', '.join(self.candidates)}"
            )


def graph_timer(
    calls: Mapping[str, Sequence[timing.Call]], device: torch.device
) -> dict[str, Rival]:
    """Times of every list of calls on `device`, by replays of a CUDA graph in turns; refused is
    what cannot be captured. On a CPU by its clock, launches included."""
    samplers, rivals = {}, {}
    with timing.side_stream(device):
        for name, of_name in calls.items():
            try:
                if device.type == "cuda":
                    for call in of_name:
                        call()
                    samplers[name] = timing.replay_sampler(of_name, device)
                else:
                    samplers[name] = timing.loop_sampler(of_name, device)
            except Exception as error:
                rivals[name] = Rival(refused=_reason(error))
        for name, t in timing.measure(samplers, ROUNDS).items():
            rivals[name] = Rival(t.median_us, t.low_us, t.high_us)
    return rivals


def choose(
    jobs: Sequence[Job],
    *,
    measure: bool = True,
    deterministic: bool = False,
    timer: Timer = graph_timer,
    store: Store | None = None,
) -> list[Choice]:
    """The choice for each of `jobs`: remembered, shipped, or measured now and remembered.

    measure: where False, what is neither remembered nor shipped stays the baseline.
    deterministic: nothing is measured or remembered. The shipped winner for the same site and GPU
        is taken if its numbers hold here, else the baseline.
    store: where choices are remembered; None is the file in the user's cache folder.

    Measuring is announced on stderr, once a process and GPU. What a candidate raises is a refusal;
    only one that takes the device down with it ends the process. Random states are as before.
    """
    store = store or user_store(cache_dir())
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        if deterministic:
            return [_from_table(job, store) for job in jobs]
        if not measure:
            return [_remembered(job, store) or _from_table(job, store) for job in jobs]
        return _remembered_or_measured(jobs, timer, store)


def _remembered_or_measured(jobs: Sequence[Job], timer: Timer, store: Store) -> list[Choice]:
    pending = {job.key for job in jobs if _remembered(job, store) is None}
    for gpu in {key.gpu for key in pending} - store.announced:
        store.announced.add(gpu)
        print(f"measuring plans for {gpu}, to be remembered in {store.path}", file=sys.stderr)
    choices = []
    with tqdm(
        total=len(pending),
        delay=2,
        smoothing=0,
        leave=False,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        bar_format="measuring plans: {n_fmt} of {total_fmt}, about {remaining_s:.0f} s left",
    ) as bar:
        for job in jobs:
            choice = _remembered(job, store)
            if choice is None:
                choice, keep = _measured(job, timer)
                store.add(choice, keep)
                bar.update()
            choices.append(choice)
    if pending and torch.cuda.is_available():
        torch.cuda.empty_cache()  # the graphs' own memory pools
    return choices


def _remembered(job: Job, store: Store) -> Choice | None:
    found = store.find(job.key)
    # a choice among other candidates is no answer
    same = found and found.rivals.keys() == job.candidates.keys()
    return found if same and found.baseline == job.baseline else None


def _from_table(job: Job, store: Store) -> Choice:
    rivals = {job.baseline: Rival()}
    shipped = store.find_shipped(job.key)
    if shipped and shipped.baseline == job.baseline and shipped.winner in job.candidates:
        refusal = None if shipped.winner == job.baseline else _refusal(job, shipped.winner)
        if refusal is None:
            return replace(shipped, key=job.key)
        rivals[shipped.winner] = Rival(refused=refusal)
        reason = f"the shipped choice {shipped.winner} is refused here, and nothing is measured"
    else:
        reason = f"no shipped choice for {job.key.gpu}, and nothing is measured"
    return Choice(job.key, job.baseline, job.baseline, rivals, reason)


def _measured(job: Job, timer: Timer) -> tuple[Choice, bool]:
    """The choice, and whether it is to be remembered: not when the baseline or the memory failed,
    which says more of this moment than of the candidates."""
    refusals = {name: _refusal(job, name) for name in job.candidates}
    sound = [name for name, refusal in refusals.items() if refusal is None]
    found = {name: Rival(refused=refusal) for name, refusal in refusals.items()}
    try:
        found |= _times(job, sound, timer) if sound else {}
    except torch.OutOfMemoryError:
        found |= {name: Rival(refused=OUT_OF_MEMORY) for name in sound}
    winner, reason = decide(found, job.baseline)
    lasting = all(rival.refused != OUT_OF_MEMORY for rival in found.values())
    keep = lasting and found[job.baseline].refused is None
    return Choice(job.key, winner, job.baseline, found, reason), keep


def _times(job: Job, names: list[str], timer: Timer) -> Mapping[str, Rival]:
    first = job.make_inputs(0)
    tensors = [leaf for leaf in tree_leaves(first) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise ValueError(f"{job.key.what}: make_inputs gives no tensors in lists, tuples or dicts")
    device = tensors[0].device
    sets = timing.rotations(sum(tensor.nbytes for tensor in tensors), device)
    inputs = [first, *(job.make_inputs(i) for i in range(1, sets))]
    calls = {name: [partial(job.candidates[name], one) for one in inputs] for name in names}
    return timer(calls, device)


def _refusal(job: Job, name: str) -> str | None:
    """Why candidate `name` must not be taken: it raises, or its numbers are wrong."""
    try:
        inputs = job.make_inputs(0)  # again for each: a candidate may write into them
        with _poisoned_memory():
            outputs = job.candidates[name](inputs)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # so that a fault is this candidate's
        return job.check(name, outputs)
    except Exception as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:160]


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so an element that a candidate never writes is seen."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*deterministic")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = True
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.select", description="Chosen plans.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--show", action="store_true", help="print every choice and its rivals")
    action.add_argument("--clear", action="store_true", help="remove the user's choices")
    action.add_argument(
        "--ship", action="store_true", help="write this GPU's choices into kernels/selected"
    )
    parser.add_argument("--json", action="store_true", help="with --show: as JSON")
    options = parser.parse_args(arguments)
    if options.json and not options.show:
        parser.error("--json goes with --show")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    store = user_store(cache_dir())
    if options.ship:
        return _ship(store)
    return _clear(store) if options.clear else _show(store, options.json)


def _ship(store: Store) -> int:
    if not torch.cuda.is_available():
        print("error: there is no CUDA device here whose choices could be shipped", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name()
    try:
        path, count = store.ship(gpu)
    except LookupError:
        print(
            f"error: {store.path} has no choices for {gpu}: measure first, with "
            'python -m profiling.speed or models.fuse(model, plan="measure")',
            file=sys.stderr,
        )
        return 2
    except (OSError, ValueError) as error:
        print(f"error: the table of {gpu} cannot be written: {error}", file=sys.stderr)
        return 7
    print(f"{path}: the choices for {gpu}, {count} in all")
    return 0


def _clear(store: Store) -> int:
    try:
        store.path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        print(f"nothing to remove: there is no {store.path}")
    except OSError as error:
        print(f"error: cannot remove {store.path}: {error.strerror or error}", file=sys.stderr)
        return 7
    else:
        print(f"removed {store.path}; plans are measured again")
    return 0


def _show(store: Store, as_json: bool) -> int:
    tables = {store.path: list(store.read().values()), **store.shipped}
    choices = [(path, choice) for path, table in tables.items() for choice in table]
    if as_json:
        print(json.dumps([{"file": str(path), **asdict(c)} for path, c in choices], indent=1))
    elif not choices:
        print(f"No plan has been chosen: {store.path} holds none, and none is shipped.")
    else:
        print("\n\n".join(f"{choice.describe()}\n  from {path}" for path, choice in choices))
    return 0


if __name__ == "__main__":
    sys.exit(main())
