"""Where a training step's time goes, by NVTX range, from Nsight Systems or torch.profiler:

    python -m profiling.nsys --out DIR -- --model resnet34 --fused
    python -m profiling.nsys --out OTHER --against DIR -- --model resnet34

trains with the flags of `train.run` until some steps after the warm-up are recorded, prints GPU
time, kernels, launch gaps and share of the step for every range, and with --against the difference
to an earlier profile. DIR holds trace.nsys-rep, for Nsight Systems' own window, and profile.html.

Without a GPU Nsight Systems sees the ranges alone; --kineto, and any machine without nsys, records
with torch.profiler instead, and keeps its Chrome trace with --trace FILE (for ui.perfetto.dev).
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from profiling import window
from profiling.profile_files import (
    describe,
    describe_difference,
    read_profile,
    write_page,
    write_profile,
)
from profiling.ranges import Trace
from profiling.rows import ROOT
from profiling.traces import read_chrome, read_sqlite
from profiling.window import CAPTURE, Kineto, Settings
from train.arguments import Parser
from train.errors import LapisError

PLACES = ("/opt/nvidia/nsight-systems", "/usr/local/cuda/bin", "/usr/lib/nsight-systems/bin")


class ProfilerError(LapisError):
    """Nsight Systems that fails or does not finish."""


def find_nsys() -> Path | None:
    """Nsight Systems' command line, on the PATH or where it is usually installed."""
    on_path = shutil.which("nsys")
    if on_path:
        return Path(on_path)
    found = (path for place in PLACES for path in sorted(Path(place).glob("**/nsys"), reverse=True))
    return next((path for path in found if os.access(path, os.X_OK) and path.is_file()), None)


def find_importer(nsys: Path) -> Path | None:
    """The program that makes a report of what was recorded; Debian's nsys does not find its own."""
    for folder in nsys.resolve().parents:
        for place in ("host-linux-x64", "nsight-systems/host-linux-x64"):
            importer = folder / place / "QdstrmImporter"
            if importer.is_file():
                return importer
    return None


def profile_command(
    nsys: Path, report: Path, settings: Settings, flags: Sequence[str], cuda: bool
) -> list[str]:
    """The whole command. Without CUDA only NVTX can be traced; sampling is off: it adds nothing
    here, and on some virtual machines it hangs."""
    capture = ["--capture-range=cudaProfilerApi"]
    if not cuda:
        capture = ["--capture-range=nvtx", f"--nvtx-capture={CAPTURE}"]
    return [
        str(nsys),
        "profile",
        f"--trace={'cuda,nvtx,cudnn,cublas' if cuda else 'nvtx'}",
        *(["--cuda-graph-trace=node"] if cuda else []),
        "--sample=none",
        "--cpuctxsw=none",
        *capture,
        "--capture-range-end=stop",
        "--force-overwrite=true",
        f"--output={report}",
        *(sys.executable, "-m", "profiling.window", "--capture", "cuda" if cuda else "nvtx"),
        *("--skip", str(settings.skip), "--steps", str(settings.steps)),
        *(["--no-graph"] if settings.no_graph else []),
        *("--", *flags),
    ]


def record_nsys(
    nsys: Path, out: Path, settings: Settings, flags: Sequence[str], seconds: float
) -> Trace:
    """The window as Nsight Systems sees it. Raises ProfilerError; `seconds` limits the whole."""
    report = out / "trace"
    for suffix in (".qdstrm", ".nsys-rep", ".sqlite"):
        report.with_suffix(suffix).unlink(missing_ok=True)
    command = profile_command(nsys, report, settings, flags, torch.cuda.is_available())
    print(shlex.join(command), flush=True)
    status = run_limited(command, seconds)
    raw, finished = report.with_suffix(".qdstrm"), report.with_suffix(".nsys-rep")
    if not finished.exists() and raw.exists():
        importer = find_importer(nsys)
        if importer is None:
            raise ProfilerError(
                f"nsys left {raw} and the program that reads it, QdstrmImporter, is not beside"
                f" {nsys}: install Nsight Systems whole, or use --kineto"
            )
        run_limited([str(importer), "-i", str(raw)], seconds, quiet=True)
    if not finished.exists():
        raise ProfilerError(
            f"nsys recorded nothing (exit code {status}): its last lines say why; use --kineto to"
            " profile without it"
        )
    export = report.with_suffix(".sqlite")
    options = ["--type=sqlite", "--force-overwrite=true", f"--output={export}", str(finished)]
    run_limited([str(nsys), "export", *options], seconds, quiet=True)
    if not export.exists():
        raise ProfilerError(f"nsys could not export {finished}: open it in Nsight Systems")
    return read_sqlite(export)


def run_limited(command: Sequence[str], seconds: float, quiet: bool = False) -> int:
    """Run a command; its exit code. Raises ProfilerError when it takes too long,
    after ending it and all that it started."""
    environment = os.environ | {
        "NSYS_NVTX_PROFILER_REGISTER_ONLY": "0",  # or the window's name must be a registered string
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=subprocess.DEVNULL if quiet else None,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise ProfilerError(
            f"{Path(command[0]).name} did not finish within {seconds:g} s: raise --limit, profile"
            " fewer --steps, or use --kineto to profile without it"
        ) from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def record_kineto(settings: Settings, flags: Sequence[str], trace: Path | None) -> Trace:
    """The window as torch.profiler sees it; its Chrome trace stays in `trace`."""
    with tempfile.TemporaryDirectory() as folder:
        path = trace or Path(folder) / "trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        status = window.profile_training(flags, settings, Kineto(path))
        if status:  # the training has said why
            raise SystemExit(status)
        return read_chrome(path)


def main(argv: list[str] | None = None) -> int:
    """Profile a training; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    try:
        own, flags = window.split_flags(words, "profiling.nsys --out DIR")
        profile(own, flags, shlex.join(["python", "-m", "profiling.nsys", *words]))
    except LapisError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def profile(own: list[str], flags: list[str], command: str) -> None:
    """The job that the flags before and after `--` describe. Raises LapisError."""
    parser = Parser("profiling.nsys", __doc__)
    window.add_settings(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/profile"), help="folder to write (%(default)s)"
    )
    parser.add_argument("--against", type=Path, help="folder of an earlier profile")
    parser.add_argument(
        "--limit", type=float, default=600.0, help="seconds nsys may take (%(default)s)"
    )
    parser.add_argument("--kineto", action="store_true", help="torch.profiler instead of nsys")
    parser.add_argument("--trace", type=Path, help="keep torch.profiler's trace in this file")
    args = parser.parse_args(own)
    settings = window.settings_of(args)
    window.check_training(flags)  # a wrong flag of the training ends here, before nsys starts
    old = None if args.against is None else read_profile(args.against)
    args.out.mkdir(parents=True, exist_ok=True)
    nsys = None if args.kineto or args.trace else find_nsys()
    if nsys is None:
        if not (args.kineto or args.trace):
            print("nsys is not installed: recording with torch.profiler")
        trace, source = record_kineto(settings, flags, args.trace), "torch.profiler"
    else:
        trace = record_nsys(nsys, args.out.resolve(), settings, flags, args.limit)
        source = "Nsight Systems"
    summary = write_profile(args.out, trace, source)
    print(describe(summary))
    if trace.device == "none":
        print("only the ranges could be traced: --kineto also shows what runs within them")
    if old is not None:
        print(describe_difference(old, summary))
    write_page(args.out, command, old, str(args.against))
    print(f"{args.out / 'profile.html'}")


if __name__ == "__main__":
    sys.exit(main())
