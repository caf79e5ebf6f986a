"""The named ranges: which are opened, where, with which shapes, and that they change nothing."""

import contextlib
import threading
import timeit

import pytest
import torch
from torch import nn

from models import build_model
from models.blocks import BasicBlock
from models.layers import run_layers, run_trunk
from profiling import nvtx
from tests.test_step import OPTIM, Batches, equal, snapshot, training
from tests.test_trunk import make_chain, on_plan
from train.loop import evaluate, fit

LAYERS = ["stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "head"]


class Log:
    """An opener that notes what is opened, within what, on which thread."""

    def __init__(self):
        self.opened: list[tuple[str, tuple | int | None]] = []
        self.stacks: dict[int, list[str]] = {}

    @contextlib.contextmanager
    def __call__(self, name, payload):
        stack = self.stacks.setdefault(threading.get_ident(), [])
        stack.append(name)
        shape = tuple(payload) if isinstance(payload, tuple) else payload
        self.opened.append(("/".join(stack), shape))
        yield
        assert stack.pop() == name, "ranges of one thread end in the wrong order"

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.opened]


@pytest.fixture
def log():
    yield Log()
    nvtx.switch_off()


def test_the_ranges_of_two_steps(log):
    run = training(OPTIM)
    nvtx.switch_on(run.model, log)
    fit(run, Batches((8, 4)), Batches((8,)), 5, [])
    one = [
        "step",
        "step/data",
        "step/forward",
        *(f"step/forward/{layer}" for layer in LAYERS),
        "step/backward",
        *(f"step/backward/{layer}" for layer in reversed(LAYERS)),
        "step/optimizer",
    ]
    validation = ["validation", *(f"validation/{layer}" for layer in LAYERS)]
    epoch = ["epoch", *(f"epoch/{path}" for path in one * 2), *validation]
    assert log.paths == epoch * OPTIM.epochs
    shapes = dict(log.opened[: len(one) + 1])
    assert shapes["epoch"] == 1
    assert shapes["epoch/step/forward"] == shapes["epoch/step/forward/stem"] == (8, 3, 32, 32)
    assert shapes["epoch/step/backward/layer3.0"] == (8, 32, 4, 4)
    assert shapes["epoch/step/forward/head"] == (8, 64, 1, 1)
    numbers = [payload for path, payload in log.opened if path == "epoch/step"]
    assert numbers == [1, 2] * OPTIM.epochs
    assert not any(log.stacks.values()), "a range was left open"


def test_a_training_is_the_same_with_and_without(log):
    ends = []
    for on in (False, True):
        run = training(OPTIM)
        if on:
            nvtx.switch_on(run.model, log)
        fit(run, Batches((8, 4, 8)), None, 5, [])
        ends.append(snapshot(run))
    assert equal(*ends)
    assert len(log.opened) > 50


def test_the_trunk_names_its_blocks_and_their_plan_and_stays_one_function(log, generator):
    plan = "P1"
    model = on_plan(make_chain(BasicBlock), plan)
    x = torch.randn(2, 32, 5, 6, generator=generator)
    before = run_trunk(list(model), x.to(next(model.parameters()).device))
    nvtx.switch_on(model, log)
    y = run_trunk(list(model), x.to(before.device))
    torch.testing.assert_close(y, before, rtol=0, atol=0)
    assert type(y.grad_fn).__name__ == "_TrunkBackward"
    y.sum().backward()
    forward = [("0", (2, 32, 5, 6, plan)), ("1", (2, 32, 5, 6, plan)), ("2", (2, 64, 3, 3, plan))]
    assert log.opened == forward + forward[::-1]


def test_a_block_without_kernels_is_named_backward_too(log, generator):
    model = nn.Sequential(*make_chain(BasicBlock))
    nvtx.switch_on(model, log)
    run_layers([model], torch.randn(2, 32, 5, 6, generator=generator)).sum().backward()
    # the first block's input wants no gradient: nothing would end its range
    assert log.paths == ["0", "1", "2", "2", "1"]


def test_off_means_off(log):
    nvtx.switch_on(None, log)
    with nvtx.range("seen"):
        nvtx.switch_off()
    with nvtx.range("unseen"):
        pass
    x = torch.ones(2, requires_grad=True) * 1
    y = nvtx.through(lambda t: t * 2, "unseen", x)
    assert not x._backward_hooks
    y.sum().backward()
    assert log.paths == ["seen"]


def test_evaluation_leaves_no_backward_range_open(log):
    run = training(OPTIM)
    nvtx.switch_on(run.model, log)
    evaluate(run, run.model.eval(), Batches((8,)))
    assert log.paths == LAYERS


def test_a_frozen_stem_has_no_backward(log):
    model = build_model("micro_resnet")
    model.conv1.weight.requires_grad_(False)
    nvtx.switch_on(model, log)
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert log.paths == [*LAYERS, *reversed(LAYERS[1:])]  # layer1's input wants one: a norm's
    assert not any(log.stacks.values())


def test_nothing_stays_hooked_to_a_weight(log):
    model = build_model("micro_resnet")
    nvtx.switch_on(model, log)
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert not model.conv1.weight._backward_hooks
    assert len(log.opened) == 4 * len(LAYERS)


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (None, "x"),
        (7, "x"),
        ((8, 3, 4), "x | 8x3x4"),
        (torch.Size([8, 3]), "x | 8x3"),
        ((2, 64, "P4"), "x | 2x64 P4"),
    ],
)
def test_text_of_a_range(payload, text):
    assert nvtx.text_of("x", payload) == text


def test_every_opener_works_here_and_cuda_stands_in_for_a_missing_package(monkeypatch):
    for opener in (nvtx.nvtx_range, nvtx.cuda_range, nvtx.profiler_range):
        with opener("x", (2, 3)), opener("y", 1):
            pass
    monkeypatch.setattr(nvtx, "nvtx", None)
    nvtx.switch_on()
    seen = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda text: seen.append(text))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("end"))
    with nvtx.range("x", (2, 3)):
        pass
    nvtx.switch_off()
    assert seen == ["x | 2x3", "end"]


def test_off_costs_next_to_nothing_of_a_micro_step(log):
    run, batches = training(OPTIM), Batches((8,))
    nvtx.switch_on(run.model, log)
    fit(run, batches, None, 5, [])
    nvtx.switch_off()
    opened = len(log.opened) / OPTIM.epochs
    x = torch.ones(2, 3)

    def one():
        with nvtx.range("x", x.shape):
            pass

    batch = batches.batches[0]
    step = min(timeit.repeat(lambda: run.train_step(batch, 1, 1), number=1, repeat=20))
    cost = min(timeit.repeat(one, number=1000, repeat=20)) / 1000
    assert opened > 15
    assert opened * cost < 2e-3 * step
