"""CUDA graphs for the training step: all it launches becomes one launch.

At small batches the host needs longer to launch hundreds of kernels than the GPU to run them.
"""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from train.step import TrainingStep

WARM_UP = 3  # runs before a capture: libraries load, kernels compile, algorithms are chosen


class CudaGraph:
    """What a function launches, recorded to be launched again at once."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        """Run `function` a few times, then capture it; returns the tensor each replay fills.

        Raises RuntimeError when something in it cannot be captured.
        """
        # gradients are accumulated on the capture's stream, and nothing on another waits for them
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        try:
            # entered here too: a capture that fails does not bring the old stream back
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    function()
                # the threads of a loader pin memory meanwhile, which is no part of the capture
                with torch.cuda.graph(self.graph, stream=aside, capture_error_mode="thread_local"):
                    return function()
        finally:
            here.wait_stream(aside)

    def replay(self) -> None:
        """Launch what was recorded, on the current stream."""
        self.graph.replay()


class CapturedStep:
    """A training step that is replayed from a graph, captured at its first batch.

    Batches of another shape, such as the last of an epoch, run through the step itself; so do steps
    that a probe looks into, and all when there is no graph: `reason` then says why, as one warning
    does. `replayed` counts the steps from the graph, `launched` the others by their reason.
    """

    def __init__(self, step: TrainingStep, graph: CudaGraph | None = None):
        self.step = step
        self.graph = graph or CudaGraph()
        self.reason: str | None = None
        self.replayed = 0
        self.launched: Counter[str] = Counter()
        self._inputs: list[Tensor] | None = None
        self._weights: list[int] = []  # where they lie in the graph

    def forget(self) -> None:
        """Capture anew at the next batch: the step has other work to do from now on."""
        if self._inputs is not None:
            self.graph, self._inputs = type(self.graph)(), None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """As the step, whose inputs these are; the next call overwrites what it returns."""
        why = self._why_launched(inputs)
        if why is not None:
            self.launched[why] += 1
            return self.step(*inputs)
        self.replayed += 1
        for static, value in zip(self._inputs, inputs, strict=True):
            static.copy_(value)
        self.step.refresh()  # the graph takes the weights' copies as they are
        self.graph.replay()
        self.step.count_update()  # which in a replay no code of the host does
        return self._outcome

    def _why_launched(self, inputs: tuple[Tensor, ...]) -> str | None:
        """Why this step is not replayed; None, with a graph captured, where it is."""
        if self.step.probes:
            return "a probe looks at the gradients"
        if self._inputs is None and self.reason is None:
            self._capture(inputs)
        elif self.reason is None and self._weights != self._addresses():
            self._give_up("the weights have moved to other memory since the capture")
        if self.reason is not None:
            return self.reason
        return None if _alike(self._inputs, inputs) else "a batch of another size"

    def _addresses(self) -> list[int]:
        return [p.data_ptr() for p in self.step.model.parameters()]

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        warnings.warn(f"no CUDA graph ({reason}): every kernel is launched", stacklevel=5)

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        """Record the step on copies of `inputs`; what it changes is as before, random state too."""
        tqdm.write("compiling the kernels and capturing the step, once: half a minute or so")
        tensors = self.step.tensors()
        before = [tensor.clone() for tensor in tensors]
        static = [value.clone() for value in inputs]
        device = self.step.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                self._outcome = self.graph.record(lambda: self.step(*static))
            self._inputs, self._weights = static, self._addresses()
        except RuntimeError as error:
            # the end of a failed capture fails as well, and says less
            self._give_up(str(error.__context__ or error).split("\n")[0])
        finally:
            # one that failed half way has left gradients
            self.step.optimizer.zero_grad(set_to_none=True)
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def _alike(first: list[Tensor], second: tuple[Tensor, ...]) -> bool:
    return [(t.shape, t.dtype) for t in first] == [(t.shape, t.dtype) for t in second]
