"""Several processes against one: the same batches, gradients, statistics, records and stops.

The processes talk through gloo on the CPU. They are started once for the file, and given jobs."""

import contextlib
import copy
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from models import build_model, chosen_plans, restore_plans, sync_bn, synchronise
from tests.test_step import OPTIM, Batches
from train import checkpoint, distributed, run
from train.data.loader import Batch, Loader
from train.data.resident import ResidentLoader, ViewLoader
from train.distributed import share
from train.errors import UsageError
from train.loop import Listener, evaluate, train_epoch
from train.training import NonFiniteLoss, Training

CPU = torch.device("cpu")
CLASSES = 5
# 50 photos for training: full batches of 16 and a last one of 2, which leaves two of four idle
QUICK = ["--model", "micro_resnet", "--image-size", "32", "--limit", "60", "--batch-size", "16"]
QUICK += ["--device", "cpu", "--amp", "off", "--epochs", "2", "--no-doctor"]
QUICK += ["--optimizer", "sgd", "--lr", "0.03"]


# ---- processes


def _serve(pipe, rank: int) -> None:
    """A process's life: jobs come through `pipe`, results go back."""
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    while True:
        job, arguments, size, port = pipe.recv()
        os.environ |= environment(rank, size, port)
        try:
            pipe.send((job(*arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    return {n: str(v) for n, v in (numbers | places | {"TORCHELASTIC_RUN_ID": "test"}).items()}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Processes:
    """Up to `most` processes; called with a number of them and a function of this module, so many
    run it as torchrun would, and what each returns comes back in their order."""

    def __init__(self, most: int):
        context = multiprocessing.get_context("fork")  # of a process that has the libraries loaded
        self.pipes, self.members = [], []
        for rank in range(most):
            here, there = context.Pipe()
            self.members.append(context.Process(target=_serve, args=(there, rank), daemon=True))
            self.members[-1].start()
            self.pipes.append(here)
            there.close()

    def ask(self, size: int, job, arguments: tuple) -> None:
        port = free_port()
        for pipe in self.pipes[:size]:
            pipe.send((job, arguments, size, port))

    def __call__(self, size: int, job, *arguments):
        self.ask(size, job, arguments)
        answers = [self.answer(rank) for rank in range(size)]
        problems = [problem for _, problem in answers if problem is not None]
        assert not problems, "\n".join(problems)
        return [result for result, _ in answers]

    def answer(self, rank: int):
        assert self.pipes[rank].poll(90), f"process {rank} does not answer"
        return self.pipes[rank].recv()

    def end(self) -> None:
        for member in self.members:
            member.kill()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A fork of a process whose threads compute would wait for them forever."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def processes(one_thread, cache_folder):
    started = Processes(4)
    yield started
    started.end()


@pytest.fixture
def two(processes):
    return partial(processes, 2)


@pytest.fixture
def four(processes):
    return partial(processes, 4)


@pytest.fixture(params=[2, 4])
def several(processes, request):
    return partial(processes, request.param)


# ---- shares of a batch


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_shares_follow_one_another_and_none_is_of_one_image(parts):
    for count in range(40):
        places = [share(count, part, parts) for part in range(parts)]
        assert [p for first, last in places for p in range(first, last)] == list(range(count))
        sizes = [last - first for first, last in places]
        assert sizes == sorted(sizes, reverse=True)
        assert count < 2 or (1 not in sizes and sizes[0] - min(s for s in sizes if s) <= 1)


@pytest.mark.parametrize("augment", ["none", "strong", "heavy"])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_shares_are_the_batches_of_one_process(augment, balanced, workers):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (21, 40, 40, 3), dtype=np.uint8)
    labels, rows = rng.integers(0, 3, 21), np.arange(21)[::-1].copy()
    options = {"batch_size": 8, "image_size": 32, "augment": augment, "shuffle": True, "seed": 5}
    options |= {"balance": labels[rows] if balanced else None, "workers": workers}
    (whole, *parts) = (
        list(Loader(images, labels, rows, part=part, parts=count, **options).epoch(3))
        for part, count in ((0, 1), (0, 4), (1, 4), (2, 4), (3, 4))
    )
    assert [[len(b.labels) for b in part] for part in parts] == [
        [2, 2, 3],
        [2, 2, 2],
        [2, 2, 0],
        [2, 2, 0],
    ]
    for expected, *found in zip(whole, *parts, strict=True):
        assert all(torch.equal(batch.indices, expected.indices) for batch in found)
        assert torch.equal(torch.cat([batch.images for batch in found]), expected.images)
        assert torch.equal(torch.cat([batch.labels for batch in found]), expected.labels)


def test_the_shares_made_on_a_gpu_are_the_batches_of_one_process():
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (13, 16, 16, 3), dtype=np.uint8))
    labels = rng.integers(0, 3, 13)
    options = {"batch_size": 10, "image_size": 12, "augment": "light", "shuffle": True}
    loaders = [
        ResidentLoader(pixels, labels, np.arange(13), part=part, parts=count, **options)
        for part, count in ((0, 1), (0, 2), (1, 2))
    ]
    for epochs in (
        [list(a.epoch(2)) for a in loaders],
        [list(ViewLoader(a).epoch(2)) for a in loaders],
    ):
        for expected, *found in zip(*epochs, strict=True):
            assert all(torch.equal(batch.indices, expected.indices) for batch in found)
            assert sum(batch.share for batch in found) == expected.share == len(expected.indices)
    for views, *found in zip(*(ViewLoader(a).epoch(2) for a in loaders), strict=True):
        made = [a.make(*b.inputs) for a, b in zip(loaders, (views, *found), strict=True)]
        for whole, first, second in zip(*made, strict=True):
            assert torch.equal(whole, torch.cat([first, second]))


# ---- the training step


class Shares:
    """The shares that this process has of the batches of another loader."""

    def __init__(self, batches: Batches):
        self.batches = batches
        self.part, self.parts = distributed.rank(), distributed.size()

    def __len__(self) -> int:
        return len(self.batches)

    def size_at(self, epoch: int) -> int:
        return 32

    def epoch(self, epoch: int, start: int = 0):
        for images, labels, indices in self.batches.epoch(epoch, start):
            a, b = share(len(labels), self.part, self.parts)
            yield Batch(images[a:b], labels[a:b], indices)


def network(**options) -> nn.Module:
    torch.manual_seed(3)
    return build_model("micro_resnet", CLASSES, **options).double()


def after_training(sizes, config, options, sync, counts=None):
    """The record of an epoch and the state_dict behind it, in float64; `sync`: with the norms of
    several processes synchronised."""
    batches = Batches(sizes)
    batches.batches = [Batch(b.images.double(), *b[1:]) for b in batches.batches]
    model = network(**options)
    if sync and distributed.size() > 1:
        synchronise(model)
    training = Training(model, config, total_steps=len(sizes), amp_dtype=None, class_counts=counts)
    record = train_epoch(training, Shares(batches), 1, [])
    moved = {**model.state_dict(), **{f"average {n}": v for n, v in training.weights().items()}}
    return record, moved


def joined_training(*arguments):
    with distributed.joined(CPU):
        return after_training(*arguments)


SIZES = (16, 13, 5, 2)  # of four processes two get nothing of the third, three of the last


@pytest.mark.parametrize("loss", ["ce", "weighted_ce", "focal"])
@pytest.mark.parametrize(("norm", "accumulate"), [("group", 1), ("group", 2), ("batch", 1)])
def test_steps_are_those_of_one_process_on_the_whole_batch(several, norm, accumulate, loss):
    config = replace(OPTIM, loss=loss, clip_grad=1.0)
    arguments = [SIZES, config, {"norm": norm}, norm == "batch", (1, 2, 3, 4, 5)]
    record, truth = after_training(*arguments)
    arguments[1] = replace(config, accumulate=accumulate)
    results = several(joined_training, *arguments)
    for found, moved in results:
        for name in ("train_loss", "train_accuracy", "skipped_steps"):
            assert found[name] == pytest.approx(record[name], rel=1e-6)
        for name, value in truth.items():
            # the loss is computed in float32
            torch.testing.assert_close(moved[name], value, rtol=1e-5, atol=1e-7, msg=name)
    for _, moved in results[1:]:
        assert all(torch.equal(moved[name], results[0][1][name]) for name in truth)
    untouched = after_training((16,), replace(config, lr=0.0), *arguments[2:])[1]
    assert not torch.allclose(truth["fc.weight"], untouched["fc.weight"], rtol=1e-3)


def test_without_sync_bn_each_process_normalises_its_own_share(two):
    """Against the definition: two networks with statistics of their own, one update of both."""
    config, sizes = replace(OPTIM, ema=0.0), (10,)
    results = two(joined_training, sizes, config, {}, False)
    (batch,) = Batches(sizes).epoch(1)
    models = [network().train() for _ in range(2)]
    for model, (a, b) in zip(models, ((0, 5), (5, 10)), strict=True):
        logits = model(batch.images[a:b].double())
        smoothing = config.label_smoothing
        F.cross_entropy(logits.float(), batch.labels[a:b], label_smoothing=smoothing).backward()
    for name, found in results[0][1].items():
        if "running" in name and "average" not in name:
            both = [model.get_buffer(name) for model in models]
            torch.testing.assert_close(found, sum(both) / 2, rtol=1e-6, atol=1e-9)
    rate = results[0][0]["learning_rate"]
    p, q = (model.get_parameter("layer2.0.conv1.weight") for model in models)
    gradient = (p.grad + q.grad) / 2 + config.weight_decay * p.detach()
    moved = p.detach() - rate * (1 + config.momentum) * gradient  # Nesterov's first step
    torch.testing.assert_close(results[0][1]["layer2.0.conv1.weight"], moved, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(results[1][1][n], v) for n, v in results[0][1].items())


def bad_step():
    """What a NaN in an image of the last process raises, and whether the weights stayed."""
    with distributed.joined(CPU):
        training = Training(network().float(), OPTIM, total_steps=6, amp_dtype=None)
        batches = Batches((8, 8))
        batches.batches[1].images[7, 0, 5, 5] = torch.nan
        before = copy.deepcopy(training.model.state_dict())
        with pytest.raises(NonFiniteLoss) as caught:
            train_epoch(training, Shares(Batches((8,), bad=(1,))), 1, [])
        now = training.model.state_dict()
        same = all(torch.equal(now[name], value) for name, value in before.items())
        training.bad = []
        with pytest.raises(NonFiniteLoss) as last:
            train_epoch(training, Shares(batches), 2, [])
        return caught.value.indices, same, last.value.indices


def test_a_bad_image_of_one_process_stops_all_and_names_the_whole_batch(two):
    for first, unchanged, last in two(bad_step):
        assert first == [*range(8)]
        assert unchanged
        assert last == [*range(8, 16)]


def mixing(batch_size: int):
    """What two batches are mixed with: one is of mixup, one of CutMix."""
    with distributed.joined(CPU):
        options = {"amp_dtype": None, "mixup_alpha": 0.4, "cutmix_alpha": 1.0, "seed": 7}
        training = Training(network(), OPTIM, total_steps=1, **options)
        a, b = share(batch_size, distributed.rank(), distributed.size())
        return [training.mixing(b - a, 2, number) for number in (10, 11)]


def test_a_process_mixes_its_own_images_with_the_same_share_and_box(four):
    found = four(mixing, 6)
    for number in range(2):
        partners, lams, boxes = zip(*(process[number] for process in found), strict=True)
        assert [sorted(partner.tolist()) for partner in partners] == [[0, 1]] * 3 + [[]]
        assert all(torch.equal(lam, lams[0]) for lam in lams)
        assert all(torch.equal(box, boxes[0]) for box in boxes)
        assert (lams[0] < 1) != boxes[0].any()


# ---- synchronised batch normalisation


def synchronised_norm(x, weight, bias, dy):
    with distributed.joined(CPU):
        a, b = share(len(x), distributed.rank(), distributed.size())
        x, weight, bias = (
            tensor.detach().clone().requires_grad_() for tensor in (x[a:b], weight, bias)
        )
        y, mean, var, count = sync_bn.batch_norm(x, weight, bias, 1e-5)
        y.backward(dy[a:b])
        return y.detach(), x.grad, weight.grad, bias.grad, mean, var, count


@pytest.mark.parametrize("images", [9, 2])
def test_synchronised_norm_is_batch_norm_of_all_images(several, images, generator):
    x, dy = (torch.randn(images, 6, 5, 3, generator=generator).double() for _ in range(2))
    x = (x + 4).to(memory_format=torch.channels_last)
    weight, bias = (torch.rand(6, generator=generator).double() + 0.5 for _ in range(2))
    truth = nn.BatchNorm2d(6, momentum=1.0).double()
    truth.weight.data, truth.bias.data = weight.clone(), bias.clone()
    leaf = x.clone().requires_grad_()
    y = truth(leaf)
    y.backward(dy)
    parts = several(synchronised_norm, x, weight, bias, dy)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), y.detach(), **close)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), leaf.grad, **close)
    torch.testing.assert_close(sum(p[2] for p in parts), truth.weight.grad, **close)
    torch.testing.assert_close(sum(p[3] for p in parts), truth.bias.grad, **close)
    for *_, mean, var, count in parts:
        assert count == 15 * images
        torch.testing.assert_close(mean, truth.running_mean, **close)
        torch.testing.assert_close(var * count / (count - 1), truth.running_var, **close)


def test_synchronised_variance_does_not_cancel(two, generator):
    x = torch.randn(16, 4, 8, 8, generator=generator) + 1000
    truth = x.double().var((0, 2, 3), correction=0)
    ones, dy = torch.ones(4), torch.ones_like(x)
    for *_, var, _ in two(synchronised_norm, x, ones, ones, dy):
        torch.testing.assert_close(var.double(), truth, rtol=2e-5, atol=0)


# ---- validation


def validation(count: int, batch_size: int):
    with distributed.joined(CPU):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        loader = Loader(
            images,
            np.arange(count) % CLASSES,
            np.arange(count)[::-1].copy(),
            batch_size=batch_size,
            image_size=32,
            part=distributed.rank(),
            parts=distributed.size(),
        )
        training = Training(network().float(), OPTIM, total_steps=1, amp_dtype=None)
        return evaluate(training, training.model.eval(), loader)


def alone(job, *arguments):
    """`job` in this process, which nobody has started as one of several."""
    return job(*arguments)


@pytest.mark.parametrize(("count", "batch_size"), [(23, 8), (3, 2), (1, 64)])
def test_validation_counts_every_image_once_and_in_order(several, count, batch_size):
    logits, labels = alone(validation, count, batch_size)
    for found, names in several(validation, count, batch_size):
        assert torch.equal(names, labels)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)


# ---- plans


def plans_of_all():
    with distributed.joined(CPU):
        part = {"part": distributed.rank(), "parts": distributed.size()}
        images, labels = np.zeros((6, 32, 32, 3), np.uint8), np.zeros(6, np.int64)
        loader = Loader(images, labels, np.arange(6), image_size=32, batch_size=6, **part)
        model = network().float()
        if distributed.is_first():  # which alone has measured them
            restore_plans(model, PLANS)
        before = copy.deepcopy(model.state_dict())
        distributed.agree_on_plans(model, loader, loader, torch.float32, contextlib.nullcontext())
        kept = all(torch.equal(before[n], v) for n, v in model.state_dict().items())
        return chosen_plans(model), kept


PLANS = {"layer1.0": {"16x8x8 bfloat16 cpu": (3, "P3")}, "bn1": {"inference": (3, "library")}}


def test_all_processes_take_the_plans_of_the_first(two):
    assert two(plans_of_all) == [(PLANS, True), (PLANS, True)]


# ---- whole runs


def command(argv: list[str], *watching: Listener) -> tuple[int, str]:
    """The exit code of `train.run`, and all that it wrote to stdout and stderr."""
    sys.stdout.flush()
    before = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as told:
        for number in (1, 2):
            os.dup2(told.fileno(), number)
        try:
            code = run.main(argv, watching)
        finally:
            sys.stdout.flush()
            for number, kept in enumerate(before, start=1):
                os.dup2(kept, number)
                os.close(kept)
        told.seek(0)
        return code, told.read().decode()


def final(folder: Path) -> dict:
    return checkpoint.load(folder / "checkpoints" / "last.pt")


def assert_same_end(first: Path, second: Path) -> None:
    one, other = final(first), final(second)
    for part in ("model", "weights"):
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), name
    assert torch.equal(one["rng"], other["rng"])
    timed = {"seconds", "images_per_second"}
    for a, b in zip(one["history"], other["history"], strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {
            k: v for k, v in b.items() if k not in timed
        }


RANDOM = [*QUICK, "--epochs", "3", "--dropout", "0.2", "--mixup", "0.4", "--cutmix", "1"]


@pytest.fixture(scope="module")
def trained(processes, tmp_path_factory) -> Path:
    """An uninterrupted run of two processes with everything in it that draws."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    (code, told), (other, silence) = processes(2, command, [*RANDOM, "--out", str(folder)])
    assert (code, other, silence) == (0, 0, "")
    assert told.count("processes: 2") == told.count("done in") == 1
    return folder


def test_the_first_process_writes_what_one_process_writes(trained, tmp_path):
    assert run.main([*RANDOM, "--out", str(tmp_path / "one")]) == 0
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*")}
        for folder in (trained, tmp_path / "one")
    ]
    assert names[0] == names[1]
    assert json.loads((trained / "summary.json").read_text())["processes"] == 2
    draws = final(trained)["rng"]
    assert not torch.equal(draws[0], draws[1])


def test_a_synchronised_run_has_the_record_of_one_process(several, tmp_path, capsys):
    folders = [tmp_path / "one", tmp_path / "more"]
    # norms over two values, as in a batch of two images here, turn rounding into signs
    calm = [*QUICK, "--batch-size", "18", "--lr", "3e-4"]
    assert run.main([*calm, "--out", str(folders[0])]) == 0
    results = several(command, [*calm, "--sync-bn", "--out", str(folders[1])])
    assert [code for code, _ in results] == [0] * len(results)
    assert [told for _, told in results[1:]] == [""] * (len(results) - 1)
    one, more = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in folders
    )
    for expected, found in zip(one, more, strict=True):
        for name in ("train_loss", "val_loss"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
        for name in ("epoch", "learning_rate", "skipped_steps"):
            assert found[name] == expected[name]
        for name in ("train_accuracy", "val_accuracy"):
            assert found[name] == pytest.approx(expected[name], abs=0.11)
    assert len(more) == 2


@dataclass
class SignalAt(Listener):
    """Sends a process a signal behind a step of the run."""

    rank: int
    step: int
    number: int

    def step_ended(self, step):
        self.step -= 1
        if self.step == 0 and distributed.rank() == self.rank:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_any_process_stops_all_and_the_run_goes_on(
    two, trained, tmp_path, number, code
):
    folder = tmp_path / "run"
    results = two(command, [*RANDOM, "--out", str(folder)], SignalAt(1, 6, number))
    assert [found for found, _ in results] == [code, code]
    assert "after step 3 of epoch 2 and saved" in results[0][1]
    assert results[1][1] == ""
    assert final(folder)["steps"] == 7
    results = two(command, ["--resume", str(folder)])
    assert [found for found, _ in results] == [0, 0]
    assert "after step 3 of epoch 2 (last.pt)" in results[0][1]
    assert_same_end(trained, folder)


@pytest.mark.parametrize("size", [1, 4])
def test_another_number_of_processes_does_not_resume(processes, trained, size, capsys):
    argv = ["--resume", str(trained)]
    if size == 1:
        assert run.main(argv) == 2
        told = capsys.readouterr().err
    else:
        results = processes(size, command, argv)
        assert [code for code, _ in results] == [2] * size
        told = results[0][1]
    assert f"was trained by 2 processes, and {size} would go on otherwise" in told
    assert "with torchrun, 2 processes in all" in told


def test_what_several_processes_cannot_do_is_refused(four, tmp_path):
    for flags, sentence in (
        (["--batch-size", "7"], "among 4 processes with --accumulate 1: give at least 8"),
        (["--batch-size", "9", "--accumulate", "2"], "--accumulate 2: give at least 16"),
        (["--sync-bn", "--backend", "triton"], "--sync-bn needs the eager backend, not triton"),
        (["--sync-bn", "--norm", "group"], "--sync-bn has no effect with --norm group"),
    ):
        results = four(command, [*QUICK, *flags, "--out", str(tmp_path / "run")])
        assert [code for code, _ in results] == [2] * 4
        assert sentence in results[0][1]
        assert [told for _, told in results[1:]] == [""] * 3
    assert not (tmp_path / "run").exists()


def test_one_process_is_told_that_sync_bn_has_no_effect(tmp_path, capsys):
    assert run.main([*QUICK, "--epochs", "1", "--sync-bn", "--out", str(tmp_path / "run")]) == 0
    assert "warning: --sync-bn has no effect: there is one process" in capsys.readouterr().err


@dataclass
class DieAt(Listener):
    """Ends a process as `kill -9` does, behind a step."""

    rank: int
    step: int

    def step_ended(self, step):
        self.step -= 1
        if self.step == 0 and distributed.rank() == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def test_the_others_end_soon_where_one_process_has_died(cache_folder, tmp_path):
    pair = Processes(2)
    pair.ask(2, command, ([*RANDOM, "--out", str(tmp_path / "run")], DieAt(1, 5)))
    (code, told), problem = pair.answer(0)
    assert (code, problem) == (1, None)
    assert "error: another process of this run has ended" in told
    assert "Traceback" not in told
    assert final(tmp_path / "run")["steps"] == 4
    pair.end()


def elastic(argv: list[str], variables: dict[str, str]) -> None:
    """torchrun's launcher, with two processes and a restart."""
    os.environ |= variables
    settings = LaunchConfig(
        1, 1, 2, run_id="restart", rdzv_backend="c10d", max_restarts=1, start_method="fork"
    )
    results = elastic_launch(replace(settings, rdzv_endpoint="localhost:0"), run.main)(argv)
    os._exit(0 if results == {0: 0, 1: 0} else 1)


def test_torchrun_starts_a_killed_run_again_where_it_was_saved(trained, tmp_path):
    """The first process is killed while it writes the checkpoint behind the second epoch."""
    folder = tmp_path / "run"
    variables = {"LAPIS_FAULT": "last.pt:synced:3", "GLOO_SOCKET_IFNAME": "lo"}
    arguments = ([*RANDOM, "--out", str(folder)], variables)
    agent = multiprocessing.get_context("fork").Process(target=elastic, args=arguments)
    agent.start()
    agent.join(60)
    assert agent.exitcode == 0
    assert_same_end(trained, folder)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in environment(0, 4, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused = pytest.raises(UsageError, match="4 processes share 2 GPUs: give torchrun")
    with refused, distributed.joined(torch.device("cuda")):
        pass


def test_a_restart_needs_a_folder_that_it_can_find(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert run.main(QUICK) == 2
    assert "add --out FOLDER" in capsys.readouterr().err
