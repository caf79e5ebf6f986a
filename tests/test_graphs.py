"""The captured step: static buffers, restoring after the warm-up, other shapes, and fallbacks.

On the CPU a stand-in for the CUDA graph runs the recorded function again on every replay: it shows
what the wrapper does around a capture, not that a GPU can capture the step. The tests marked `gpu`
do that."""

import copy
import math
import warnings
from dataclasses import replace
from unittest import mock

import pytest
import torch

from kernels import weight_update
from models import build_model, set_backend
from models.weight_copies import WeightCopies
from tests.helpers import DEVICE
from tests.test_step import CLASSES, OPTIM, Batches, equal, micro_resnet, snapshot, steps, training
from train.graphs import WARM_UP, CapturedStep
from train.loop import fit, train_epoch
from train.training import NonFiniteLoss

SIZES = (8, 8, 5, 8, 8, 3, 8, 8)  # of eight batches; two are not of the captured shape


class Rerun:
    """A graph that replays by calling the recorded function again, on whatever its tensors hold."""

    def __init__(self):
        self.replays = 0

    def record(self, function):
        for _ in range(WARM_UP):
            function()
        self.function, self.outcome = function, function()
        return self.outcome

    def replay(self):
        self.replays += 1
        self.outcome.copy_(self.function())


class Refuses:
    """A graph that fails half way through the step, as a capture does."""

    def record(self, function):
        function()
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        finally:
            raise RuntimeError("the capture was invalidated")


def captured(graph, config=OPTIM, **options):
    run = training(config, total=len(SIZES), **options)
    run.run_step = CapturedStep(run.step, graph)
    return run


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_captured_steps_are_the_uncaptured_ones(optimizer, dtype):
    config = replace(OPTIM, optimizer=optimizer, clip_grad=1.0)
    options = {"amp_dtype": dtype, "mixup_alpha": 0.4}
    ends = []
    for graph in (None, Rerun()):
        model = build_model("micro_resnet", CLASSES, dropout=0.3)
        model.load_state_dict(micro_resnet().state_dict())
        torch.manual_seed(7)  # of the dropout
        run = training(config, total=len(SIZES), model=model, **options)
        if graph is not None:
            run.run_step = CapturedStep(run.step, graph)
        found = steps(run, Batches(SIZES))
        ends.append((found, snapshot(run)))
    assert ends[0][0] == ends[1][0]
    assert equal(ends[0][1], ends[1][1])
    assert graph.replays == SIZES.count(8)


def test_capturing_leaves_everything_as_it_was():
    class Watching(Rerun):
        def replay(self):
            raise InterruptedError

    run = captured(Watching(), model=build_model("micro_resnet", CLASSES, dropout=0.5))
    before, random_state = snapshot(run), torch.get_rng_state()
    with pytest.raises(InterruptedError):
        steps(run, Batches())
    assert equal(snapshot(run), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in run.model.parameters())


def test_replaying_writes_into_no_batch():
    """The graph reads its own copies: the first batch, from which they were made, stays too."""
    batches = Batches()
    before = [tensor.clone() for batch in batches.batches for tensor in batch]
    steps(captured(Rerun()), batches)
    assert equal([tensor for batch in batches.batches for tensor in batch], before)


def test_a_step_that_cannot_be_captured_runs_all_the_same():
    run, plain = captured(Refuses()), training(total=len(SIZES))
    with pytest.warns(UserWarning, match=r"no CUDA graph \(operation not permitted when .*\)"):
        found = steps(run, Batches(SIZES))
    assert run.run_step.reason == "operation not permitted when stream is capturing"
    assert found == steps(plain, Batches(SIZES))
    assert equal(snapshot(run), snapshot(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        run.total_steps = 2 * len(SIZES)
        steps(run, Batches(SIZES), 2)


def test_half_a_step_leaves_no_gradients_behind():
    class Breaks(Rerun):
        def record(self, function):
            def broken(gradient):
                raise RuntimeError("no capture")

            hook = run.model.conv1.weight.register_hook(broken)  # the last gradient of all
            try:
                return super().record(function)
            finally:
                hook.remove()

    run = captured(Breaks())
    with pytest.warns(UserWarning, match="no capture"):
        found = steps(run, Batches(SIZES))
    assert found == steps(training(total=len(SIZES)), Batches(SIZES))


def test_a_replay_sees_restored_state_and_evaluated_weights():
    """Restoring, and evaluating the average, write into the tensors a graph knows."""
    ends = []
    for graph in (None, Rerun()):
        run = training(total=24)
        if graph is not None:
            run.run_step = CapturedStep(run.step, graph)
        start = copy.deepcopy(run.state())
        steps(run, Batches())
        run.restore(start)
        run.config = replace(run.config, epochs=2)
        fit(run, Batches(), Batches((4, 4)), CLASSES, [])
        ends.append(snapshot(run))
    assert equal(*ends)
    assert graph.replays == 18


def test_a_bad_loss_in_a_replay_changes_nothing():
    run = captured(Rerun())
    train_epoch(run, Batches((8, 8)), 1, [])
    before = snapshot(run)
    with pytest.raises(NonFiniteLoss) as caught:
        train_epoch(run, Batches((8,), bad=(1,)), 2, [])
    assert caught.value.indices == [*range(8)]
    assert equal(snapshot(run), before)


class WithoutHost(Rerun):
    """A replay runs no code of the host: nothing looks after the weights' copies, or counts."""

    def replay(self):
        with (
            mock.patch.object(WeightCopies, "refresh"),
            mock.patch.object(WeightCopies, "written"),
            mock.patch("torch.autograd.graph.increment_version"),
        ):
            super().replay()


def test_a_replay_takes_copies_that_are_right(monkeypatch):
    """Whatever wrote to the weights between two replays."""
    monkeypatch.setattr(weight_update, "runs_triton", lambda _: False)
    ends = []
    for graph in (None, WithoutHost()):
        run = training(total=40, amp_dtype=torch.bfloat16, fused=True)
        if graph is not None:
            run.run_step = CapturedStep(run.step, graph)
        start = copy.deepcopy(run.state())
        steps(run, Batches())
        run.model.load_state_dict(micro_resnet().state_dict())
        steps(run, Batches())
        run.restore(start)
        steps(run, Batches())
        torch.nn.init.normal_(run.model.fc.weight)
        run.config = replace(run.config, epochs=2)
        fit(run, Batches(), Batches((4, 4)), CLASSES, [])
        ends.append(snapshot(run))
    assert graph.replays == 30
    assert equal(*ends)


def test_two_captured_steps_share_weights(monkeypatch):
    """Each one's copies follow what the other's replays wrote."""
    monkeypatch.setattr(weight_update, "runs_triton", lambda _: False)
    ends = []
    for graphs in ((None, None), (WithoutHost(), WithoutHost())):
        model = micro_resnet()
        runs = [
            training(total=40, model=model, amp_dtype=torch.bfloat16, fused=True) for _ in graphs
        ]
        for run, graph in zip(runs, graphs, strict=True):
            run.run_step = run.step if graph is None else CapturedStep(run.step, graph)
        for epoch in range(1, 4):
            for run in runs:
                steps(run, Batches((8, 8)), epoch)
        ends.append([snapshot(run) for run in runs])
    assert all(equal(a, b) for a, b in zip(*ends, strict=True))


def test_how_many_steps_were_replayed_and_why_not():
    assert training().graph_steps() is None
    run = captured(Rerun())
    steps(run, Batches(SIZES))
    assert run.graph_steps() == {"replayed": 6, "launched": {"a batch of another size": 2}}
    run = captured(Refuses())
    with pytest.warns(UserWarning, match="no CUDA graph"):
        steps(run, Batches(SIZES))
    reason = "operation not permitted when stream is capturing"
    assert run.graph_steps() == {"replayed": 0, "launched": {reason: 8}}


def test_a_probe_sees_gradients_and_changes_no_step():
    """Before the capture, between two replays, and as long as it is there."""
    config = replace(OPTIM, clip_grad=1e-3)
    run, plain = (captured(g, config, amp_dtype=torch.float16) for g in (Rerun(), Rerun()))
    norms = []

    def probe():
        assert all(p.grad is not None for p in run.model.parameters())
        norms.append(sum(p.grad.norm() ** 2 for p in run.model.parameters()).item() ** 0.5)

    batches = Batches((8,) * 5).batches
    for number, batch in enumerate(batches, start=1):
        run.step.probes[:] = [probe] if number in (1, 4) else []
        ours, theirs = (one.train_step(batch, 1, number) for one in (run, plain))
        assert run.finish(ours) == plain.finish(theirs)
    assert equal(snapshot(run), snapshot(plain))
    assert all(0.01 < norm < 100 for norm in norms)  # of the loss itself, and not clipped
    assert len(norms) == 2
    reason = "a probe looks at the gradients"
    assert run.graph_steps() == {"replayed": 3, "launched": {reason: 2}}


def test_weights_that_have_moved_are_not_replayed():
    """A graph would go on training the memory where they were."""
    run, plain = captured(Rerun()), training(total=len(SIZES))
    for one in (run, plain):
        steps(one, Batches((8, 8)))
        one.model.double().float()
    with pytest.warns(UserWarning, match="moved to other memory"):
        found = steps(run, Batches((8, 8)), 2)
    assert found == steps(plain, Batches((8, 8)), 2)
    assert run.graph_steps()["replayed"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_gpu_replays_what_it_would_launch(backend, optimizer, dtype, exact_float32):
    rate = 0.05 if optimizer == "sgd" else 1e-3
    config = replace(OPTIM, optimizer=optimizer, clip_grad=1.0, lr=rate)
    runs, start = [], list(micro_resnet().to(DEVICE).parameters())
    for graph in (False, True):
        model = build_model("micro_resnet", CLASSES, backend=backend)
        model.load_state_dict(micro_resnet().state_dict())
        model = model.to(DEVICE, memory_format=torch.channels_last)
        run = training(
            config,
            total=len(SIZES),
            model=model,
            amp_dtype=dtype,
            mixup_alpha=0.4,
            fused=backend == "triton",
            cuda_graph=graph,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*train one by one")  # in float32
            found = steps(run, Batches(SIZES, device=DEVICE))
        runs.append((run, found))
    (plain, truth), (replayed, found) = runs
    assert replayed.run_step.reason is None
    # the same kernels; only atomics and the algorithms cuDNN picks may round otherwise
    tolerance = 1e-3 if dtype is None else 3e-2
    assert [s.loss for s in found] == pytest.approx([s.loss for s in truth], rel=tolerance)
    assert replayed.steps == plain.steps
    for one, other in zip(snapshot(plain), snapshot(replayed), strict=True):
        assert torch.allclose(one, other, rtol=10 * tolerance, atol=tolerance)
    weights = zip(plain.model.parameters(), replayed.model.parameters(), start, strict=True)
    for one, other, before in weights:  # they have moved, and alike
        assert 0 < (one - before).norm()
        assert (one - other).norm() <= 0.1 * (one - before).norm() + 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_replaying_never_waits_for_the_gpu(backend):
    model = set_backend(micro_resnet(), backend).to(DEVICE, memory_format=torch.channels_last)
    config, fused = replace(OPTIM, clip_grad=1.0), backend == "triton"
    options = {"mixup_alpha": 0.2, "amp_dtype": torch.float16, "cuda_graph": True, "fused": fused}
    run = training(config, model=model, **options)
    batches = Batches(device=DEVICE).batches
    run.finish(run.train_step(batches[0], 1, 1))  # captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        underway = [run.train_step(batch, 1, n) for n, batch in enumerate(batches[1:4], start=2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(run.finish(step).loss) for step in underway)


@pytest.mark.gpu
def test_a_gpu_stops_within_a_few_steps_and_names_the_rows():
    run = training(model=micro_resnet().to(DEVICE), cuda_graph=True, total=60)
    with pytest.raises(NonFiniteLoss, match="step 3") as caught:
        train_epoch(run, Batches((8,) * 60, bad=(3,), device=DEVICE), 1, [])
    assert caught.value.indices == [*range(16, 24)]
    assert run.steps < 10
    assert all(tensor.isfinite().all() for tensor in run.step.tensors())
