"""Where a training step's time goes: `python examples/where_time_goes.py [FLAGS of train.run]`.

Profiles some steps of a small training with torch.profiler, which needs no GPU, prints the ranges
and names the page. `python -m profiling.nsys` does the same with Nsight Systems.
"""

import sys

from profiling import nsys

SMALL = "--model micro_resnet --image-size 64 --val-scale 1 --batch-size 8 --limit 100"

if __name__ == "__main__":
    flags = sys.argv[1:] or SMALL.split()
    sys.exit(nsys.main(["--kineto", "--skip", "2", "--steps", "4", "--", *flags]))
