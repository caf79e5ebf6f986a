"""A normal training that also shows where a step's time goes:

    python -m profiling.train_profile -- --model resnet34 --fused --data PATH

trains as `train.run` does with these flags; torch.profiler records some steps after the warm-up,
and report.html of the run shows the table and the picture of them.
"""

import sys
import tempfile
from pathlib import Path

from profiling import window
from profiling.profile_files import describe, write_profile
from profiling.traces import read_chrome
from profiling.window import Kineto, Window
from train import run
from train.arguments import Parser
from train.errors import DataError, LapisError


def main(argv: list[str] | None = None) -> int:
    """Train and profile; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    parser = Parser("profiling.train_profile", __doc__)
    window.add_settings(parser)
    try:
        own, flags = window.split_flags(words, "profiling.train_profile")
        settings = window.settings_of(parser.parse_args(own))
    except LapisError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace.json"

        def over(folder: Path) -> None:
            try:
                print(describe(write_profile(folder, read_chrome(trace), "torch.profiler")))
            except DataError as error:  # no reason to end the training
                print(f"no profile: {error}", file=sys.stderr)

        return run.main(flags, [Window(settings, Kineto(trace), over)])


if __name__ == "__main__":
    sys.exit(main())
