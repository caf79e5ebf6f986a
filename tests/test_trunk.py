"""The plans of the trunk against its blocks in eager float64: outputs, every gradient, running
statistics, twenty steps of training, what is saved and what is launched."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import Bottleneck

from kernels.launch import record
from models import build_model, fuse, set_backend, trunk, units
from models.blocks import BasicBlock, PlainBlock, PreActBlock, PreActBottleneck
from models.blocks import Bottleneck as OurBottleneck
from models.layers import run_layers, run_trunk
from tests.helpers import DEVICE, assert_two_errors

pytestmark = pytest.mark.usefixtures("poisoned", "exact_float32")


def bottleneck(c_in, c_out, stride, act):
    """A torchvision block of three convolutions."""
    downsample = None
    if stride != 1 or c_in != c_out:
        conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
        downsample = nn.Sequential(conv, nn.BatchNorm2d(c_out))
    block = Bottleneck(c_in, c_out // 4, stride, downsample)
    block.relu = {"relu": nn.ReLU, "silu": nn.SiLU}[act]()
    return block


def make_chain(cls, act="relu", width=32):
    """Two blocks, the second with stride 2 and twice the channels, then one that changes nothing;
    their norms far from their start."""
    shapes = ((width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1))
    blocks = [cls(*shape, act) for shape in shapes]
    for module in nn.ModuleList(blocks).modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return blocks


def on_plan(blocks, plan):
    """Copies of the blocks on the kernels, with that plan, or with one each: "P3 P1 P4"."""
    model = nn.Sequential(*copy.deepcopy(blocks)).to(DEVICE, memory_format=torch.channels_last)
    if isinstance(blocks[0], Bottleneck):
        return fuse(model, "triton", plan)
    for block, one in zip(model, plan.split() * len(blocks), strict=False):
        set_backend(block, "triton", one)
    return model


def outcome(run, model, x, dy):
    x = x.detach().requires_grad_()
    y = run(model, x)
    gradients = torch.autograd.grad(y, [x, *model.parameters()], dy.to(y.dtype))
    names = ["dx", *(name for name, _ in model.named_parameters())]
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize("plan", trunk.PLANS)
@pytest.mark.parametrize(
    ("dtype", "act"), [(torch.float32, "relu"), (torch.bfloat16, "silu")], ids=["float32", "bf16"]
)
@pytest.mark.parametrize("cls", [PlainBlock, BasicBlock, bottleneck])
def test_every_plan_matches_float64(cls, dtype, act, plan, generator):
    """In 16 bits without a mask: one that falls on the other side moves a small tensor by percents,
    by luck in ours or in eager's, and would hide what is wrong."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    check_against_float64(make_chain(cls, act), dtype, plan, generator)


@pytest.mark.parametrize(
    ("plan", "dtype", "act", "activated"),
    [
        *((plan, torch.float32, "relu", False) for plan in trunk.PLANS),
        *((plan, torch.bfloat16, "silu", False) for plan in ("P1", "P3", "P4")),
        *((plan, torch.float32, "relu", True) for plan in ("P1", "P4", "P3 P1 P4")),
    ],
)
def test_every_plan_matches_float64_with_preactivation(plan, dtype, act, activated, generator):
    """Where the first input is `activated` already, the first block has no norm before it."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    blocks = make_chain(PreActBlock, act, width=16)
    if activated:
        blocks[0].bn1 = None
    check_against_float64(blocks, dtype, plan, generator)


@pytest.mark.parametrize("plan", ["P1", "P4"])
@pytest.mark.parametrize("cls", [OurBottleneck, PreActBottleneck])
def test_three_convolutions_a_block(cls, plan, generator):
    torch.manual_seed(2)
    check_against_float64(make_chain(cls), torch.float32, plan, generator)


def check_against_float64(blocks, dtype, plan, generator):
    """The output, every gradient and the running statistics of a chain, by the two-error rule."""
    width = blocks[0].conv1.in_channels
    x = torch.randn(2, width, 7, 6, generator=generator).to(DEVICE, dtype)
    dy = torch.randn(2, 2 * width, 4, 3, generator=generator).to(DEVICE)
    eager = nn.Sequential(*copy.deepcopy(blocks)).to(DEVICE, dtype)
    exact = copy.deepcopy(eager).double()
    ours = on_plan(blocks, plan)
    with torch.no_grad():  # the weights that both round to, in the float32 that ours keeps
        for mine, theirs in zip(ours.parameters(), eager.parameters(), strict=True):
            mine.copy_(theirs)
    truth = outcome(lambda m, x: m(x), exact, x.double(), dy.double())
    theirs = outcome(lambda m, x: m(x), eager, x, dy)
    found = outcome(lambda m, x: run_trunk(list(m), x), ours.float(), x, dy)
    deep = 5e-2 if isinstance(blocks[0], Bottleneck) else 1e-2  # nine convolutions in a row
    slack = 1e-5 if dtype == torch.float32 else deep
    for name, value in truth.items():
        assert found[name].dtype == (dtype if name in ("y", "dx") else torch.float32)
        away, allowed = ((f[name].double() - value).norm() for f in (found, theirs))
        assert away <= 2 * allowed + slack * value.norm(), name
    for (key, value), expected in zip(
        ours.named_buffers(), dict(exact.named_buffers()).values(), strict=True
    ):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(
            value.double(), expected.double(), rtol=tolerance, atol=tolerance, msg=key
        )


@pytest.mark.parametrize("act", ["leaky_relu", "silu"])
@pytest.mark.parametrize("plan", ["P1", "P4"])
def test_other_activations(plan, act, generator):
    """leaky_relu keeps a mask, silu the identity that was added."""
    torch.manual_seed(1)
    blocks = make_chain(BasicBlock, act)
    x = torch.randn(2, 32, 5, 6, generator=generator).to(DEVICE)
    dy = torch.randn(2, 64, 3, 3, generator=generator).to(DEVICE)
    eager = nn.Sequential(*copy.deepcopy(blocks)).to(DEVICE)
    truth = outcome(lambda m, x: m(x), copy.deepcopy(eager).double(), x.double(), dy.double())
    theirs = outcome(lambda m, x: m(x), eager, x, dy)
    found = outcome(lambda m, x: run_trunk(list(m), x), on_plan(blocks, plan), x, dy)
    for name, value in truth.items():
        assert_two_errors(found[name], theirs[name], value, name, atol=2e-5)


def test_evaluation_with_preactivation(generator):
    """Each block by itself, conv1 with the norm after it in one kernel."""
    blocks = make_chain(PreActBlock, width=16)
    x = torch.randn(2, 16, 7, 6, generator=generator).to(DEVICE).bfloat16()
    eager = nn.Sequential(*copy.deepcopy(blocks)).to(DEVICE).eval()
    ours = on_plan(blocks, "P3").eval()
    with torch.no_grad():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            theirs, y = eager(x), run_layers([ours], x)
        assert_two_errors(y, theirs, eager.double()(x.double()), "y", atol=2e-3)


@pytest.mark.parametrize(
    ("cls", "plan"),
    [
        (PlainBlock, "P4"),
        (BasicBlock, "P1"),
        (BasicBlock, "P3"),
        (BasicBlock, "P4"),
        (PreActBlock, "P3"),
        (PreActBlock, "P4"),
    ],
)
def test_twenty_steps_give_the_losses_of_eager(cls, plan):
    torch.manual_seed(0)
    blocks = [cls(16, 16, 1, "relu"), cls(16, 16, 2, "relu")][0 if cls is BasicBlock else 1 :]
    head = nn.Linear(16, 3).to(DEVICE)
    models = {
        "float32": nn.Sequential(*copy.deepcopy(blocks)).to(DEVICE),
        "eager": nn.Sequential(*copy.deepcopy(blocks)).to(DEVICE),
        "ours": on_plan(blocks, plan),
    }
    x, labels = torch.randn(6, 16, 5, 5, device=DEVICE), torch.arange(6, device=DEVICE) % 3
    losses = {}
    for name, model in models.items():
        last = copy.deepcopy(head)
        optimizer = torch.optim.SGD([*model.parameters(), *last.parameters()], 0.05, momentum=0.9)
        losses[name] = []
        for _ in range(20):
            given = x if name == "float32" else x.bfloat16()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=name != "float32"):
                logits = last(run_layers([model], given).mean((2, 3)))
            loss = cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    exact, eager, ours = (torch.tensor(losses[name]) for name in ("float32", "eager", "ours"))
    assert (ours - exact).norm() <= 2 * (eager - exact).norm() + 1e-3
    assert exact[-1] < 0.5 * exact[0]  # it did train


def recorded(name, plan, batch=32):
    """The launches of the trunk of a whole network, forward and backward, on meta tensors; and the
    bytes an image that are kept between the two."""
    name, _, preact = name.partition("+")
    model = set_backend(build_model(name, preact=bool(preact)).to("meta"), "triton", plan)
    blocks = [block for number in range(1, 5) for block in getattr(model, f"layer{number}")]
    x = torch.empty(batch, 64, 56, 56, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with record() as recording:
        y = run_trunk(blocks, x.contiguous(memory_format=torch.channels_last))
        held = {id(t): t.nbytes for t in held_tensors(y.grad_fn.saved)}
        y.backward(torch.empty_like(y))
    return recording.launches, sum(held.values()) / batch


def held_tensors(value):
    if isinstance(value, torch.Tensor):
        return [value] if value.dim() > 1 else []
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in held_tensors(item)]
    return []


BOOKKEEPING = ("_merge_kernel", "_coefficients_kernel", "_fold_kernel", "_sum_kernel")


@pytest.mark.parametrize(
    ("name", "plan", "launched", "megabytes"),
    [
        ("resnet34", "P3", 170, 81),
        ("resnet34", "P4", 122, 70),
        ("plain34", "P3", 161, 76),
        ("plain34", "P4", 114, 65),
        ("resnet34+preact", "P3", 167, 79),
        ("resnet34+preact", "P4", 120, 66),
    ],
)
def test_launches_and_bytes_of_a_training_step(name, plan, launched, megabytes):
    """Of the trunk, without the merges of statistics, the coefficients and the sums of split
    products; the stem and the head add eight launches. Bytes an image at batch 256: every tensor
    that a launch is given, once."""
    launches, _ = recorded(name, plan, batch=256)
    counted = [one for one in launches if one.kernel.__name__ not in BOOKKEEPING]
    assert len(counted) <= launched
    moved = sum(
        sum({id(arg): arg.nbytes for arg in one.args if isinstance(arg, torch.Tensor)}.values())
        for one in counted
    )
    assert moved / 256 <= megabytes * 1e6


@pytest.mark.parametrize(
    ("name", "plan", "megabytes"),
    [
        ("resnet34", "P1", 11.9),
        ("resnet34", "P3", 11.9),
        ("resnet34", "P4", 9.2),
        ("resnet34+preact", "P1", 11.4),
        ("resnet34+preact", "P3", 11.4),
        ("resnet34+preact", "P4", 5.9),
    ],
)
def test_bytes_that_are_saved(name, plan, megabytes):
    """An image at 224 pixels, without the stem's 2.2 MB; eager keeps 16.9 with it."""
    _, saved = recorded(name, plan)
    assert saved <= megabytes * 1e6


def frozen(block):
    block.bn2.eval()


def hooked(block):
    block.conv2.register_forward_hook(lambda *_: None)


def grouped(block):
    block.conv1 = nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False)


def oblong(block):
    block.conv1 = nn.Conv2d(16, 16, (3, 1), padding=(1, 0), bias=False)


def longer_shortcut(block):
    conv = nn.Conv2d(16, 16, 1, bias=False)
    norm = set_backend(units.BatchNormAct(16, "identity"), "triton")
    block.downsample = nn.Sequential(nn.AvgPool2d(1), conv, norm)


def normed_shortcut(block):
    """Not one that pre-activation has."""
    longer_shortcut(block)
    del block.downsample[0]


class Scaled(BasicBlock):
    def forward(self, x):
        return 0.1 * super().forward(x)


def overridden(block):
    block.__class__ = Scaled


def replaced(block):
    forward = block.forward
    block.forward = lambda x: 0.1 * forward(x)


def narrow_statistics(block):
    block.bn2.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (frozen, "a norm has frozen statistics"),
        (hooked, "a hook watches them"),
        (grouped, "do not take a convolution of theirs"),
        (oblong, "do not take a convolution of theirs"),
        (longer_shortcut, "more than a convolution and a norm"),
        (overridden, "their forward is not the one"),
        (replaced, "their forward is not the one"),
        (narrow_statistics, "running statistics are not in float32"),
    ],
)
def test_a_block_that_the_trunk_does_not_know_runs_by_itself_and_says_so(change, reason):
    runs_by_itself(BasicBlock, change, reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (frozen, "a norm has frozen statistics"),
        (grouped, "do not take a convolution of theirs"),
        (normed_shortcut, "their shortcut is more than a convolution$"),
    ],
)
def test_so_does_one_with_preactivation(change, reason):
    runs_by_itself(PreActBlock, change, reason)


def runs_by_itself(cls, change, reason):
    torch.manual_seed(0)
    model = on_plan([cls(16, 16, 1, "relu") for _ in range(3)], "P1")
    change(model[1])
    model = model.to(DEVICE)
    x = torch.randn(2, 16, 5, 5, device=DEVICE).bfloat16()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        with pytest.warns(UserWarning, match=f"1 blocks train one by one: .*{reason}"):
            y = run_layers([model], x)
        torch.testing.assert_close(y, model(x), rtol=3e-2, atol=3e-2)
    assert trunks(y) == 2


def test_blocks_of_both_kinds_are_functions_of_their_own():
    model = on_plan([BasicBlock(16, 16, 1, "relu"), PreActBlock(16, 16, 1, "relu")], "P3")
    x = torch.randn(2, 16, 5, 5, device=DEVICE).bfloat16()
    y = under_autocast(model, x)
    assert trunks(y) == 2
    eager = set_backend(copy.deepcopy(model), "eager")
    torch.testing.assert_close(y, under_autocast(eager, x), rtol=3e-2, atol=3e-2)


def under_autocast(model, x):
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return run_layers([model], x)


def test_what_autograd_promises_is_kept_or_refused():
    model = on_plan([BasicBlock(16, 16, 1, "relu") for _ in range(2)], "P1")
    x = torch.randn(2, 16, 5, 5, device=DEVICE)
    with pytest.warns(UserWarning, match="additions to an input in torch.float32"):
        assert under_autocast(model, x).dtype == torch.float32
    x = x.bfloat16()
    with pytest.warns(UserWarning, match="what they save is watched"):
        y = checkpoint(under_autocast, model, x, use_reentrant=False)
    assert trunks(y) == 0
    y = under_autocast(model, x)
    with torch.no_grad():
        model[0].bn1.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = under_autocast(model, x)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="frees its activations"):
        y.sum().backward()


def test_frozen_layers_are_not_part_of_the_trunk():
    model = on_plan([BasicBlock(16, 16, 1, "relu") for _ in range(3)], "P3")
    model[:2].requires_grad_(False)
    y = under_autocast(model, torch.randn(2, 16, 5, 5, device=DEVICE).bfloat16())
    assert trunks(y) == 1
    assert len(y.grad_fn.blocks) == 1
    with record() as recording:
        y.sum().backward()
    names = [launch.kernel.__name__ for launch in recording.launches]
    assert names.count("_data_gradient_kernel") == 1  # the first convolution's input needs none


def trunks(y):
    return [type(node).__name__ for node in graph_of(y.grad_fn)].count("_TrunkBackward")


def graph_of(node):
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [after for after, _ in node.next_functions]
    return seen


def test_one_value_per_channel_is_refused():
    model = on_plan([PlainBlock(16, 16, 1, "relu")], "P1")
    with pytest.raises(ValueError, match="more than one value per channel"):
        run_trunk(list(model), torch.randn(1, 16, 1, 1, device=DEVICE, dtype=torch.bfloat16))
