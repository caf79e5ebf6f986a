"""A window of a training that a profiler sees: some steps after the warm-up.

    python -m profiling.window --capture nvtx -- --model resnet34 --fused

trains with the flags of `train.run` until the window is over and keeps nothing; `profiling.nsys`
runs it under Nsight Systems, which records only what is in the window.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from profiling import nvtx
from train import run
from train.arguments import Parser
from train.errors import LapisError, UsageError
from train.graphs import CapturedStep
from train.loop import Listener
from train.training import Step, Training

CAPTURE = "window"  # the NVTX range that Nsight Systems records, where there is no CUDA to ask


class Recorder:
    """What records the window: `start` and `stop` it, in ranges that `opener` opens."""

    opener: nvtx.Opener | None = None

    def start(self) -> None: ...

    def stop(self) -> None: ...


class NsysByCuda(Recorder):
    """Nsight Systems with --capture-range=cudaProfilerApi."""

    def start(self) -> None:
        torch.cuda.profiler.start()

    def stop(self) -> None:
        torch.cuda.profiler.stop()


class NsysByRange(Recorder):
    """Nsight Systems with --capture-range=nvtx: a range that may begin and end within others."""

    def start(self) -> None:
        self._range = torch.cuda.nvtx.range_start(CAPTURE)

    def stop(self) -> None:
        torch.cuda.nvtx.range_end(self._range)


class Kineto(Recorder):
    """torch.profiler; its Chrome trace goes to `path`."""

    opener = staticmethod(nvtx.profiler_range)

    def __init__(self, path: Path):
        self.path = path

    def start(self) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        else:  # it would complain about the GPU that is not there
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profile = torch.profiler.profile(activities=kinds, acc_events=True)
        self._profile.start()

    def stop(self) -> None:
        self._profile.stop()
        self._profile.export_chrome_trace(str(self.path))


@dataclass(frozen=True)
class Settings:
    """Steps before the window and in it; whether a captured step runs launch by launch instead."""

    skip: int
    steps: int
    no_graph: bool


class WindowOver(Exception):
    """Ends a training of which nothing but the window is wanted."""


class Window(Listener):
    """Records `steps` steps after the first `skip` of a training.

    over: called when the window has closed, with the folder of the run.
    """

    def __init__(self, settings: Settings, recorder: Recorder, over: Callable[[Path], None]):
        self.settings = settings
        self.recorder = recorder
        self.over = over
        self.seen = 0
        self.open = False

    def run_started(self, folder: Path, training: Training) -> None:
        self.folder, self.training = folder, training
        left = training.total_steps - training.steps
        self.first = max(0, min(self.settings.skip, left - self.settings.steps))
        self.last = min(self.first + self.settings.steps, left)
        if self.first < self.settings.skip:
            print(f"the training has {left} steps: its last {self.last - self.first} are profiled")
        if isinstance(training.run_step, CapturedStep):
            if self.settings.no_graph:
                training.run_step = training.step
            else:
                print(
                    "the step is replayed from a CUDA graph, within which phases and layers cannot"
                    " be told apart: --no-graph launches every kernel and shows them"
                )
        if not self.first < self.last:  # a run that is resumed after its end
            return
        if not self.first:
            self._start()

    def step_ended(self, step: Step) -> None:
        self.seen += 1
        if self.seen == self.first:
            self._start()
        elif self.seen == self.last:
            self.close()
            self.over(self.folder)

    def _start(self) -> None:
        self._wait()
        self.recorder.start()
        nvtx.switch_on(self.training.model, self.recorder.opener)
        self.open = True

    def close(self) -> None:
        """End the window, if it is open."""
        if self.open:
            nvtx.switch_off()
            self._wait()
            self.recorder.stop()
            self.open = False

    def _wait(self) -> None:
        if self.training.on_cuda:
            torch.cuda.synchronize()


def check_training(flags: Sequence[str]) -> None:
    """Raise UsageError for flags that cannot be profiled; unknown ones end in exit 2."""
    if any(flag.split("=")[0] == "--resume" for flag in flags):
        raise UsageError("--resume would train the run on: profile with the flags of the run")
    run.parse(list(flags))


def profile_training(flags: Sequence[str], settings: Settings, recorder: Recorder) -> int:
    """Train until the window is over; nothing of the run stays. Returns the exit code of a training
    that failed, which has said why, or 0."""

    def over(_folder: Path) -> None:
        raise WindowOver

    window = Window(settings, recorder, over)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return run.main([*flags, "--out", str(Path(scratch) / "run")], [window])
        except WindowOver:
            steps = window.last - window.first
            print(f"profiled {steps} steps after the first {window.first}", flush=True)
            return 0
        finally:
            window.close()


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags of `Settings`."""
    parser.add_argument("--skip", type=int, default=5, help="steps before the window (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps in the window (%(default)s)")
    parser.add_argument(
        "--no-graph", action="store_true", help="launch every kernel instead of a CUDA graph"
    )


def split_flags(argv: Sequence[str], prog: str) -> tuple[list[str], list[str]]:
    """What stands before `--`, and the flags of the training after it. Raises UsageError."""
    argv = list(argv)
    if "--" not in argv and not {"-h", "--help"} & set(argv):
        raise UsageError(
            f"the training's flags go after `--`: python -m {prog} -- --model resnet34 --fused"
        )
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the flags name. Raises UsageError for a window that holds nothing."""
    for flag, value, least in (("--skip", args.skip, 0), ("--steps", args.steps, 1)):
        if value < least:
            raise UsageError(f"{flag} must be at least {least}, not {value}")
    return Settings(args.skip, args.steps, args.no_graph)


def main(argv: list[str] | None = None) -> int:
    """Train through the window; returns the exit code."""
    parser = Parser("profiling.window", __doc__)
    add_settings(parser)
    parser.add_argument(
        "--capture",
        choices=("cuda", "nvtx"),
        required=True,
        help="what begins and ends the recording: CUDA's profiler calls, or a range",
    )
    try:
        words = sys.argv[1:] if argv is None else argv
        own, flags = split_flags(words, "profiling.window --capture nvtx")
        args = parser.parse_args(own)
        recorder = NsysByCuda() if args.capture == "cuda" else NsysByRange()
        check_training(flags)
        return profile_training(flags, settings_of(args), recorder)
    except LapisError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
