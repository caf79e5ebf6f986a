"""The 16-bit copies of the weights: right after everything that can change a weight, read by every
layer that would cast, and only inside the training step."""

import copy
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import weight_update
from models import build_model, fuse, set_backend
from models.blocks import BasicBlock
from models.layers import run_layers
from models.units import BatchNormAct, linear, stem
from models.weight_copies import WeightCopies
from tests.helpers import DEVICE
from tests.test_step import OPTIM, Batches, equal, snapshot, steps, training
from train.loop import evaluating, fit
from train.optim import set_rate
from train.step import TrainingStep, autocast

CASTS = ("aten._to_copy.default", "aten._foreach_copy_.default", "aten.copy_.default")
CLASSES = 5


@pytest.fixture
def without_kernels(monkeypatch):
    """The update is PyTorch's and a cast: what it launches has tests of its own."""
    monkeypatch.setattr(weight_update, "runs_triton", lambda _: False)


class Tiny(nn.Module):
    """A stem, a trunk, a head, as ResNet-34 has them."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1 = BatchNormAct(16)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer = nn.Sequential(BasicBlock(16, 32, 2, "relu"))
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x):
        x = stem(self.conv1, self.bn1, self.maxpool, x)
        return linear(self.fc, run_layers([self.layer], x).mean((2, 3)))


def tiny(backend="eager") -> nn.Module:
    torch.manual_seed(5)
    model = Tiny().to(DEVICE, memory_format=torch.channels_last)
    return set_backend(model, backend, "P1")


class Small(Batches):
    """Pictures of 8 pixels."""

    def __init__(self, sizes=(4, 4, 4)):
        super().__init__(sizes, device=DEVICE)
        self.batches = [b._replace(images=b.images[:, :, :8, :8]) for b in self.batches]


def run_of(config=OPTIM, model=None, fused=True, **options):
    options = {"amp_dtype": torch.bfloat16, "total": 60} | options
    return training(config, model=model or tiny(), fused=fused, **options)


class Casts(TorchDispatchMode):
    """Counts the casts of any of `weights` by their memory."""

    def __init__(self, weights):
        super().__init__()
        self.memory, self.found = {w.data_ptr() for w in weights}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) in CASTS:
            given = args[-1] if "copy_" in str(function) else args[0]
            given = given if isinstance(given, list | tuple) else [given]
            self.found += any(isinstance(t, torch.Tensor) and t.data_ptr() in self.memory
                              for t in given)  # fmt: skip
        return function(*args, **(kwargs or {}))


def logits_and_gradients(model, images, in_use):
    model = copy.deepcopy(model)
    copies = WeightCopies(model, torch.bfloat16)
    copies.refresh()
    weights = [p for p in model.parameters() if p in copies]
    with autocast(DEVICE, torch.bfloat16), Casts(weights) as casts:
        if in_use:
            with copies.in_use():
                logits = model(images)
        else:
            logits = model(images)
    logits.float().square().sum().backward()
    return casts.found, [logits.detach(), *(p.grad for p in model.parameters())]


def test_a_forward_casts_no_weight_and_computes_the_same():
    model, images = tiny("triton"), Small().batches[0].images
    without, plain = logits_and_gradients(model, images, in_use=False)
    within, ours = logits_and_gradients(model, images, in_use=True)
    assert without == 4  # the stem, the trunk in one launch, the head's weight and bias
    assert within == 0
    assert equal(ours, plain)


def test_the_head_of_a_fused_network_takes_the_copy():
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    model = fuse(network, "eager").to(DEVICE)
    copies = WeightCopies(model, torch.bfloat16)
    copies.refresh()
    with autocast(DEVICE, torch.bfloat16), Casts(model.fc.parameters()) as casts:
        model(torch.randn(2, 3, 32, 32, device=DEVICE))
        assert casts.found == 2
        with copies.in_use():
            model(torch.randn(2, 3, 32, 32, device=DEVICE))
    assert casts.found == 2


@pytest.mark.parametrize(
    ("optimizer", "dtype"), [("sgd", torch.bfloat16), ("adamw", torch.float16)], ids=str
)
def test_training_is_that_without_copies(optimizer, dtype, monkeypatch):
    # the interpreter pays for every tensor of a launch in each of its programs
    monkeypatch.setattr(weight_update, "TENSORS", 4)
    config = replace(OPTIM, optimizer=optimizer, clip_grad=1.0, lr=0.01)
    ends, losses = [], []
    for fused in (False, True):
        run = run_of(config, fused=fused, amp_dtype=dtype, mixup_alpha=0.3)
        losses.append([step.loss for step in steps(run, Small())])
        ends.append(snapshot(run))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)
    weights = [p for p in run.model.parameters() if p in run.step.copies]
    assert len(weights) == 6  # four filters, the head's weight and bias
    assert equal(run.step.copies.of(weights), [w.to(dtype) for w in weights])
    with Casts(weights) as casts:
        run.step.refresh()
    assert casts.found == 0  # the update has written them


def test_without_an_autocast_type_or_our_kernels_there_are_none():
    assert run_of(amp_dtype=None).step.copies is None
    assert run_of(fused=False).step.copies is None


def restored(run):
    state = copy.deepcopy(run.state())
    steps(run, Small((4,)))
    run.restore(state)


def evaluated(run):
    with evaluating(run) as model, torch.no_grad(), run.autocast():
        model(Small().batches[0].images)


def validated(run):
    run.config = replace(run.config, epochs=2)
    fit(run, Small((4,)), Small((4,)), CLASSES, [])


def other_step(fused):
    def change(run):
        step = TrainingStep(run.model, OPTIM, torch.bfloat16, fused)
        set_rate(step.optimizer, 0.1)
        step.average.prepare(1)
        step(*Small().batches[0].inputs)

    return change


@torch.no_grad()
def edited(run):
    run.model.fc.bias += 1


@torch.inference_mode()
def edited_without_grad(run):
    run.model.fc.weight.mul_(2)


def other_optimizer(run):
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(run.model.parameters(), lr=0.1, foreach=True).step()
    run.step.optimizer.zero_grad()


def moved(run):
    """To other memory, through a type that rounds."""
    run.model.half().float()


def replaced(run):
    run.model.fc.weight.data = torch.randn_like(run.model.fc.weight)


CHANGES = {
    "load_state_dict": lambda run: run.model.load_state_dict(tiny().state_dict()),
    "initialise": lambda run: nn.init.normal_(run.model.fc.weight),
    "resume": restored,
    "evaluation of the average": evaluated,
    "an epoch and its validation": validated,
    "in place": edited,
    "in place, in inference mode": edited_without_grad,
    "PyTorch's optimizer": other_optimizer,
    "a second training step": other_step(fused=True),
    "a second training step without our kernels": other_step(fused=False),
    "moved": moved,
    "other data": replaced,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.usefixtures("without_kernels")
def test_copies_follow_every_change(change):
    run = run_of()
    steps(run, Small((4, 4)))
    change(run)
    run.model.train()
    batch = Small().batches[2]
    expected = copy.deepcopy(run.model)  # which has no copies
    with run.autocast():
        loss = cross_entropy(expected(batch.images).float(), batch.labels, label_smoothing=0.1)
    run.average.prepare(9)
    assert run.step(*batch.inputs)[0].item() == loss.item()
    for p in run.model.parameters():
        if p in run.step.copies:
            assert torch.equal(run.step.copies.of([p])[0], p.bfloat16())


@pytest.mark.usefixtures("without_kernels")
def test_a_skipped_step_leaves_copies_and_weights():
    run = run_of()
    steps(run, Small((4,)))
    weights = [p for p in run.model.parameters() if p in run.step.copies]
    before = [t.clone() for t in (*weights, *run.step.copies.of(weights))]
    images, labels = Small().batches[0].inputs
    assert run.step(images * torch.nan, labels)[2].item() == 1
    assert equal([*weights, *run.step.copies.of(weights)], before)


@pytest.mark.usefixtures("without_kernels")
def test_an_epoch_starts_with_new_copies():
    """What PyTorch does not count: a change through `.data`, or by its fused optimizer."""
    run = run_of()
    steps(run, Small((4,)))
    run.model.conv1.weight.data.mul_(2)
    run.step.refresh()
    copied = run.step.copies.of([run.model.conv1.weight])[0]
    assert not torch.equal(copied, run.model.conv1.weight.bfloat16())  # the limit that is stated
    run.config = replace(run.config, epochs=1)
    run.history.clear()
    seen = []
    run.step.probes.append(lambda: seen.append(copied.clone()))
    expected = run.model.conv1.weight.detach().bfloat16()
    fit(run, Small((4,)), None, CLASSES, [])
    assert torch.equal(seen[0], expected)


@pytest.mark.usefixtures("without_kernels")
def test_copies_are_in_no_state_and_nothing_else_reads_them():
    run = run_of()
    plain = tiny().state_dict()
    steps(run, Small((4,)))
    assert run.model.state_dict().keys() == plain.keys()
    assert [n for n, _ in run.model.named_parameters()] == [n for n, _ in tiny().named_parameters()]
    weights = [p for p in run.model.parameters() if p in run.step.copies]
    for spoilt in run.step.copies.of(weights):
        spoilt.fill_(torch.nan)
    images = Small().batches[0].images
    with run.autocast():
        assert run.model(images).isfinite().all()
        assert run.model.eval()(images).isfinite().all()


@pytest.mark.usefixtures("without_kernels")
def test_a_frozen_weight_is_cast_as_before():
    model = tiny()
    model.conv1.weight.requires_grad_(False)
    run = run_of(model=model)
    assert model.conv1.weight not in run.step.copies
    assert all(step.loss < 10 for step in steps(run, Small((4,))))


def test_a_network_of_the_command_line():
    """micro_resnet as train.run builds it: every layer that casts has a copy."""
    model = build_model("micro_resnet", CLASSES, backend="triton")
    copies = WeightCopies(model, torch.bfloat16)
    expected = {p for n, p in model.named_parameters() if p.ndim > 1 or n == "fc.bias"}
    assert {p for p in model.parameters() if p in copies} == expected
