"""Providers that take turns, each in a process of its own.

None of them meets another's allocator, compiled code or crash, and the memory of each is its own;
while one is sampled the others sleep. A provider is a module's function, named to the process.
"""

import contextlib
import multiprocessing
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import timing
from profiling import agree, meters
from profiling.providers import Job, Provider, Unavailable, prepare

SAMPLE_US = 50_000.0  # of a whole step: many steps a sample where steps are short
# a fork of a process that has only imported: quick, and without threads or a CUDA context
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class Failed(Exception):
    """A provider that cannot be measured; the message is what its row says."""


@dataclass(frozen=True)
class Facts:
    """What a provider's process found out before it is timed."""

    dtype: str
    method: str
    first_step_s: float
    peak_memory_gb: float | None


class Contestant:
    """A provider at work in a process of its own; use as a context. Raises Failed, with the reason,
    when the provider is unavailable, raises, dies or is not ready within `seconds`."""

    def __init__(self, provider: Provider, job_file: Path, seconds: float | None = None) -> None:
        context = multiprocessing.get_context(METHOD)
        if METHOD == "forkserver":
            context.set_forkserver_preload(["profiling.turns"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, provider, job_file), daemon=False
        )
        self._process.start()
        theirs.close()
        try:
            if not self._pipe.poll(seconds):
                self._process.kill()  # busy compiling: it would not hear that we hang up
                raise Failed(f"out of time: not ready after {seconds:.0f} s")
            self.facts: Facts = self._reply()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def sample(self) -> float:
        """Microseconds a step."""
        return self._ask("sample")

    def joules(self) -> float | None:
        """Joules a step, where the device tells."""
        return self._ask("joules")

    def outputs(self) -> dict[str, Tensor]:
        """Loss and gradients, or logits, of one step from the common start."""
        return self._loaded("outputs")

    def exact_outputs(self) -> dict[str, Tensor]:
        """The same without TF32."""
        return self._loaded("exact outputs")

    def _loaded(self, what: str) -> dict[str, Tensor]:
        path = Path(self._ask(what))
        try:
            return torch.load(path)
        finally:
            path.unlink()

    def _ask(self, what: str) -> Any:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reply says why
            self._pipe.send(what)
        return self._reply()

    def _reply(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(20)
            raise Failed(f"failed: its process ended with {self._process.exitcode}") from None
        if isinstance(answer, Failed):
            raise answer
        return answer


def save_job(job: Job, folder: Path) -> Path:
    """Put `job` into a file of `folder` for the processes that will run it."""
    path = folder / "job.pt"
    torch.save(vars(job), path)
    return path


def _serve(pipe: Connection, provider: Provider, job_file: Path) -> None:
    """A contestant's process: say the facts, then answer until the other side hangs up."""
    torch.backends.cudnn.benchmark = True
    device = torch.load(job_file, map_location="cpu", mmap=True)["device"]
    job = Job(**torch.load(job_file, map_location=device))
    try:
        with timing.side_stream(device):
            runner = prepare(provider, job)
            cuda, sampler = device.type == "cuda", None
            method = "events" if cuda else "perf_counter"
            pipe.send(Facts(runner.dtype, method, runner.first_step_s, runner.peak_memory_gb))
            while True:
                what = pipe.recv()
                if what == "sample":
                    sampler = sampler or timing.loop_sampler(
                        [runner.step], device, SAMPLE_US if cuda else 0.0
                    )
                    pipe.send(sampler.sample())
                elif what == "joules":
                    pipe.send(meters.joules_of(runner.step, device))
                elif what == "outputs":
                    pipe.send(_saved(runner.outputs(job.state), job_file.parent))
                else:
                    with agree.exact_convolutions():
                        pipe.send(_saved(runner.outputs(job.state), job_file.parent))
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return
    except Unavailable as reason:
        pipe.send(Failed(f"unavailable: {reason}"))
    except Exception as error:  # a rival's failure is a result, and no reason to stop
        first_line = (str(error).strip().splitlines() or [""])[0]
        pipe.send(Failed(f"failed: {type(error).__name__}: {first_line[:160]}"))


def _saved(outputs: dict[str, Tensor], folder: Path) -> str:
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".pt", delete=False) as file:
        torch.save(outputs, file)
    return file.name
