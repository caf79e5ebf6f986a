"""What the named ranges cost a training step, off and on: `python -m profiling.nvtx_cost`.

On against off: both take turns on one network, and the median of the ratios has its interval. What
is too little to be seen that way, off against no ranges at all, is the time of one range times
their number in a step.
"""

import sys

import torch

from kernels.timing import Sampler, loop_sampler, measure, speedup
from models import build_model
from profiling import nvtx
from train.arguments import Parser
from train.config import OptimConfig
from train.data.loader import Batch
from train.training import Training


def main(argv: list[str] | None = None) -> int:
    """Print both costs; returns the exit code."""
    parser = Parser("profiling.nvtx_cost", __doc__)
    parser.add_argument("--model", default="micro_resnet", help="network (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (%(default)s)")
    parser.add_argument(
        "--image-size",
        type=int,
        default=32,
        help="height and width of the images in pixels (%(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=201, help="samples of each, taking turns")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(args.model).to(device, memory_format=torch.channels_last).train()
    config = OptimConfig(ema=0.0)
    training = Training(model, config, total_steps=10**6, amp_dtype=torch.bfloat16)
    images = torch.randn(args.batch, 3, args.image_size, args.image_size, device=device)
    labels = torch.arange(args.batch, device=device) % 5
    batch = Batch(images, labels, labels.cpu())

    opened = 0

    def count(name: str, payload: nvtx.Payload):
        nonlocal opened
        opened += 1
        return nvtx.nullcontext()

    def step() -> None:
        with nvtx.range("step", 1):
            training.finish(training.train_step(batch, 1, 1))

    def one() -> None:
        with nvtx.range("step", images.shape):
            pass

    def cost_of_one() -> float:
        sampler = loop_sampler([one] * 1000, torch.device("cpu"))
        return measure({"one": sampler}, 21)["one"].median_us

    nvtx.switch_on(model, count)
    step()
    nvtx.switch_off()
    plain = loop_sampler([step], device, at_least_us=0)

    def sample_on() -> float:
        nvtx.switch_on(model)
        try:
            return plain.sample()
        finally:
            nvtx.switch_off()

    samplers = {"off": plain, "on": Sampler(sample_on, plain.method)}
    found = measure(samplers, args.rounds)
    ratio, low, high = speedup(found["on"], found["off"])
    off_us, step_us = cost_of_one(), found["off"].median_us
    nvtx.switch_on(model)
    on_us = cost_of_one()
    nvtx.switch_off()
    print(f"{args.model}, batch {args.batch}, {args.image_size} px on {device.type}")
    for name, us in (("off", off_us), ("on", on_us)):
        share = opened * us / step_us
        print(f"{name}: {us * 1e3:.0f} ns a range, {opened} ranges are {share:.4%} of a step")
    change = f"{ratio - 1:+.2%} [{low - 1:+.2%}, {high - 1:+.2%}]"
    print(f"a step of {step_us:.0f} us with ranges on: {change}, {args.rounds} paired samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
