"""Look for a learning rate: `python -m train.lr_find` with the flags of `train.run`.

It prints a suggestion with its reason and draws the curve (--out names the picture, else
lr_find.png here); `train.run --lr find` does the same before it trains.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from models import Backend
from train.assembly import build
from train.auto_batch import with_largest_batch
from train.environment import choose_amp, choose_device, prepare
from train.errors import LapisError
from train.inputs import load_inputs, make_loaders
from train.range_test import announce, find_rate
from train.run import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the test for the run that the flags describe; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        config = parse([*words, "--lr", "find"], "train.lr_find", __doc__)
        device = choose_device(config.run.device)
        amp_dtype = choose_amp(config.run.amp, device)
        prepare(config.run)
        inputs, backend = load_inputs(config), Backend("eager", "a trial")
        if config.run.auto_batch:
            config = with_largest_batch(config, inputs, device, amp_dtype, backend)
        loader, _ = make_loaders(inputs, config, amp_dtype or torch.float32, device)
        torch.manual_seed(config.run.seed)
        counts = inputs.train_counts()
        model = build(config, len(counts), backend, device)
        found = find_rate(model, config.optim, loader, amp_dtype, counts)
        announce(found, config.run.out or Path("lr_find.png"))
    except LapisError as error:
        if "--debug" in words:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
