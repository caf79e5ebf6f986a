"""Launching over tensors of more than 2^31 elements without the time that they would take."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from unittest import mock

import numpy as np
import torch

from kernels import launch
from tests.helpers import DEVICE

ENDS = 2  # programs run at either end


@contextmanager
def only_the_ends(*rooms: ModuleType) -> Iterator[list[launch.Launch]]:
    """Launches of the modules `rooms`: interpreted, only the first and last two programs of the
    first axis run, with their own numbers. What was launched is in the list."""
    made: list[launch.Launch] = []

    def run(kernel, grid, *args, **options):
        made.append(launch.Launch(kernel, grid, args, options))
        if not launch.INTERPRET:
            launch.run(kernel, grid, *args, **options)
            return
        from triton.runtime.interpreter import interpreter_builder

        skipped = max(0, grid[0] - 2 * ENDS)

        def set_grid_idx(x, y, z):
            interpreter_builder.grid_idx = (x if x < ENDS else x + skipped, y, z)

        with mock.patch.object(interpreter_builder, "set_grid_idx", set_grid_idx):
            launch.run(kernel, (grid[0] - skipped, *grid[1:]), *args, **options)

    # the poison of `poisoned` would be the first to touch every page
    poison = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    with ExitStack() as patches:
        for room in rooms:
            patches.enter_context(mock.patch.object(room, "run", run))
        try:
            yield made
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = poison


def zeros_but(tail: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A float16 tensor of `shape` whose last rows are `tail`; on the CPU only their memory exists
    (numpy's zeros are pages that nobody has touched, PyTorch writes its own)."""
    x = torch.from_numpy(np.zeros(shape, np.float16)).to(DEVICE)
    x[-len(tail) :] = tail
    return x
