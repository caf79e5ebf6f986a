"""`fuse` against the torchvision and timm networks it was given: the same tensors and keys, the
same outputs, running statistics and gradients, and an honest report of what was left alone."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models.resnet import BasicBlock, Bottleneck

from models import BackendUnavailable, build_model, units
from models.fusion import FusedBasicBlock, FusedBottleneck, fuse, fuse_report
from models.units import BatchNormAct
from tests.helpers import DEVICE, assert_two_errors

NETWORKS = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=3),
    "torchvision resnet50": lambda: torchvision.models.resnet50(num_classes=3),
    "torchvision resnext50": lambda: torchvision.models.resnext50_32x4d(num_classes=3),
    "timm resnet18": lambda: timm.create_model("resnet18", num_classes=3),
    "timm resnet26d": lambda: timm.create_model("resnet26d", num_classes=3),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def block(cls=BasicBlock, norm=nn.BatchNorm2d, width=16):
    """One torchvision block, [N, 8, H, W] -> [N, width, H/2, W/2], in a container as in a
    network."""
    downsample = nn.Sequential(nn.Conv2d(8, width, 1, 2, bias=False), norm(width))
    return nn.Sequential(cls(8, width // cls.expansion, 2, downsample, norm_layer=norm))


def texts(model):
    return {place.name: f"{place.status}: {place.text}" for place in fuse_report(model).places}


def randomise_norms(model):
    """Weights of 0 (timm starts the last BatchNorm of a block there) would hide the residuals."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
    return model


def check_step(original, fused, x):
    """One training step, then evaluation: everything is what `original` makes of it."""
    truth = copy.deepcopy(original).double()
    labels = torch.arange(len(x), device=x.device) % 3
    for model in (original, fused, truth):
        dtype = next(model.parameters()).dtype
        cross_entropy(model(x.to(dtype)), labels).backward()
    found, eager, exact = (dict(m.named_parameters()) for m in (fused, original, truth))
    for name, parameter in exact.items():
        gradient = parameter.grad
        assert_two_errors(found[name].grad, eager[name].grad, gradient, name, atol=1e-5)
    for name, value in original.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert fused.bn1.num_batches_tracked == 1
    original.eval(), fused.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), original(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_same_tensors_and_same_mathematics(name):
    model = randomise_norms(NETWORKS[name]())
    original = copy.deepcopy(model)
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    parameters = list(map(id, model.parameters()))

    assert fuse(model, "eager") is model

    assert list(model.state_dict()) == list(original.state_dict())
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == before
    assert list(map(id, model.parameters())) == parameters
    assert all(place.status == "fused" for place in fuse_report(model).places)
    assert not any(type(m) in (nn.ReLU, nn.BatchNorm2d) for m in model.modules())
    original.load_state_dict(model.state_dict(), strict=True)
    check_step(original, model, torch.randn(2, 3, 64, 64))


def test_resnet18_on_the_kernels():
    """Every gradient of a whole torchvision network through Triton's kernels."""
    model = randomise_norms(torchvision.models.resnet18(num_classes=3))
    model = model.to(DEVICE, memory_format=torch.channels_last)
    original = copy.deepcopy(model)
    fuse(model, "triton")
    assert {m.backend for m in model.modules() if isinstance(m, BatchNormAct)} == {"triton"}
    check_step(original, model, torch.randn(2, 3, 64, 64, device=DEVICE))


@pytest.mark.parametrize("frozen", ["none", "all", "shortcut"])
@pytest.mark.parametrize("cls", [BasicBlock, Bottleneck])
def test_blocks_on_the_kernels(cls, frozen):
    """With every BatchNorm in training, in evaluation, and in different modes."""
    model = randomise_norms(block(cls)).to(DEVICE)
    for number, norm in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean += 0.1 * number
        last = norm is model[0].downsample[-1]
        norm.train(frozen == "none" or (frozen == "shortcut" and not last))
    original = copy.deepcopy(model)
    fuse(model, "triton")
    x = torch.randn(2, 8, 6, 6, device=DEVICE)
    y, expected = model(x), original(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    y.backward(dy), expected.backward(dy)
    for ours, theirs in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    for key, value in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-5)


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels as they are called."""
    calls = []

    def spy(name):
        function = getattr(units.kernels, name)

        def called(*args, **options):
            normed = options.get("residual_norm") is not None
            added = options.get("residual") is not None
            calls.append(name + (" norm" if normed else " add" if added else ""))
            return function(*args, **options)

        monkeypatch.setattr(units.kernels, name, called)

    for name in ("bn_act", "bn_act_pool", "conv_stats", "conv_bn_act"):
        spy(name)
    return calls


def test_the_kernels_are_what_runs(calls):
    """Of the kernel entry points each part of the network calls the one it is named after."""
    network = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).to(DEVICE)
    with torch.no_grad():
        fuse(network, "triton")(torch.randn(2, 3, 32, 32, device=DEVICE))
    assert calls == ["bn_act_pool", "bn_act", "bn_act add"] + 3 * ["bn_act", "bn_act norm"]


@pytest.mark.parametrize("make", [torchvision.models.ResNet, timm.models.ResNet], ids=str)
def test_the_stem_takes_statistics_from_its_convolution(make, calls):
    """In torchvision's and timm's own forward, and only as long as nobody watches the module."""
    cls = BasicBlock if make is torchvision.models.ResNet else timm.models.resnet.BasicBlock
    network = fuse(make(cls, [1, 1, 1, 1], num_classes=3).to(DEVICE), "triton")
    network.layer1 = network.layer2 = network.layer3 = network.layer4 = nn.Identity()
    network.fc = nn.Linear(64, 3, device=DEVICE)
    x = torch.randn(2, 3, 16, 16, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        network(x).sum().backward()
        assert calls == ["conv_stats", "bn_act_pool"]
        seen = []
        network.conv1.register_forward_hook(lambda *_: seen.append("conv"))
        network(x)
    assert seen == ["conv"]
    assert calls[2:] == ["bn_act_pool"]


@pytest.mark.parametrize("cls", [BasicBlock, Bottleneck])
def test_inference_is_one_kernel_a_convolution(cls, calls):
    model = randomise_norms(block(cls, width=32)).to(DEVICE, torch.bfloat16).eval()
    x = torch.randn(2, 8, 6, 6, device=DEVICE).bfloat16()
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        eager, truth = model(x), exact(x.double())
        y = fuse(model, "triton")(x)
    assert_two_errors(y, eager, truth, atol=1e-3)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    shortcut = calls.pop(-2)
    assert shortcut == "conv_bn_act"
    assert calls == ["conv_bn_act"] * (convolutions - 2) + ["conv_bn_act add"]
    calls.clear()
    model(x)  # gradients are wanted again
    assert calls == ["bn_act"] * (convolutions - 2) + ["bn_act norm"]


def test_modes_and_buffers_are_kept():
    model = block(norm=lambda c: nn.BatchNorm2d(c, eps=1e-3, momentum=None))
    model[0].bn1.eval()
    norm, statistics = model[0].bn1, model[0].bn1.running_mean
    fuse(model, "eager")
    assert model[0].bn1 is norm
    assert norm.running_mean is statistics
    assert (norm.training, model[0].bn2.training) == (False, True)
    assert (norm.eps, norm.momentum) == (1e-3, None)
    model.to(torch.bfloat16, memory_format=torch.channels_last).eval()
    y = model(torch.randn(1, 8, 6, 6, dtype=torch.bfloat16).to(memory_format=torch.channels_last))
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_hooks_of_blocks_and_convolutions_stay():
    model, seen = block(), []
    handle = model[0].register_forward_hook(lambda *_: seen.append("block"))
    model[0].conv1.register_forward_hook(lambda *_: seen.append("conv"))
    fuse(model, "eager")(torch.randn(2, 8, 6, 6))
    assert seen == ["conv", "block"]
    handle.remove()
    model(torch.randn(2, 8, 6, 6))
    assert seen == ["conv", "block", "conv"]


def test_copies_and_pickles():
    model = fuse(timm.create_model("resnet10t", num_classes=3), "eager").eval()
    x = torch.randn(1, 3, 64, 64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert str(fuse_report(other)) == str(fuse_report(model))
        torch.testing.assert_close(other(x), model(x))
        with torch.no_grad():
            other.fc.bias += 1
            other.conv1[0].weight.zero_()
            other.bn1.bias.fill_(1.0)
        assert (other(x) - model(x)).abs().max() > 0.1
        stem = other.forward_intermediates(x)[1][0]
        torch.testing.assert_close(stem[0, :, 0, 0], other.bn1(other.conv1(x))[0, :, 0, 0])


def test_timm_intermediates_are_taken_before_the_pool():
    model = timm.create_model("resnet18", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    expected_last, expected = model.forward_intermediates(x)
    logits = model(x)
    fuse(model, "eager")
    last, found = model.forward_intermediates(x)
    torch.testing.assert_close(last, expected_last)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model(x), logits)  # and the stem pools again


def test_fusing_twice_changes_only_the_backend():
    model = fuse(timm.create_model("resnet18", num_classes=3).to(DEVICE), "eager")
    before, modules = str(fuse_report(model)), list(map(id, model.modules()))
    assert str(fuse_report(fuse(model, "eager"))) == before
    assert list(map(id, model.modules())) == modules
    assert fuse_report(fuse(model, "triton")).backend == "triton"


def test_squeeze_and_excitation_is_left_alone():
    model = timm.create_model("seresnet50", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    expected, types = model(x), [type(m) for m in model.layer1.modules()]
    report = fuse_report(fuse(model, "eager"))
    assert [type(m) for m in model.layer1.modules()] == types
    torch.testing.assert_close(model(x), expected)
    left = [place for place in report.places if place.status == "left"]
    assert len(left) == 16
    assert all(place.text == "se is SEModule, which is not fused" for place in left)
    assert "1 of 17 parts fused" in str(report)
    assert "left   16 x Bottleneck: se is SEModule, which is not fused" in str(report)


class Doubled(BasicBlock):
    def forward(self, x):
        return 2 * super().forward(x)


def tanh(model):
    model[0].relu = nn.Tanh()


def replaced_forward(model):
    model[0].forward = lambda x: x


def watched(model):
    model[0].bn2.register_forward_hook(lambda *_: None)


def watched_relu(model):
    model[0].relu.register_full_backward_hook(lambda *_: None)


def group_shortcut(model):
    model[0].downsample[1] = nn.GroupNorm(4, 16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (tanh, "relu is Tanh(), which no kernel computes"),
        (replaced_forward, "its forward has been replaced"),
        (watched, "bn2 has a hook"),
        (watched_relu, "relu has a hook"),
        (group_shortcut, "the last of downsample is GroupNorm, not BatchNorm2d"),
        (nn.SyncBatchNorm.convert_sync_batchnorm, "bn1 is SyncBatchNorm, not BatchNorm2d"),
        (nn.Module.double, "bn1 is torch.float64, the kernels take float32, bfloat16 and float16"),
    ],
)
def test_what_is_not_known_is_left_alone_with_its_reason(change, reason):
    model = block()
    change(model)
    types = [type(m) for m in model.modules()]
    fuse(model, "eager")
    assert [type(m) for m in model.modules()] == types
    assert texts(model) == {"0": f"left: {reason}"}


def test_subclasses_and_other_norms_are_left_alone():
    model = nn.Sequential(
        block(Doubled),
        block(norm=lambda c: nn.BatchNorm2d(c, affine=False)),
        block(norm=lambda c: nn.GroupNorm(4, c)),
    )
    assert texts(fuse(model, "eager")) == {
        "0.0": "left: a subclass of torchvision.models.resnet.BasicBlock",
        "1.0": "left: bn1 has no weight and bias",
        "2.0": "left: bn1 is GroupNorm, not BatchNorm2d",
    }


def test_drop_path_and_other_stems():
    dropped = texts(fuse(timm.create_model("resnet18", drop_path_rate=0.1), "eager"))
    left = {name for name, text in dropped.items() if "drop_path is DropPath, which" in text}
    assert left == {f"layer{number // 2 + 1}.{number % 2}" for number in range(1, 8)}
    assert dropped["layer1.0"].startswith("fused")  # its rate is 0

    strided = timm.create_model("resnet18", num_classes=3, replace_stem_pool=True, act_layer="mish")
    x = torch.randn(2, 3, 64, 64)
    original = copy.deepcopy(strided)
    stem = texts(fuse(strided, "eager"))[""]
    assert stem == "fused: conv-bn-mish; maxpool, a Sequential, stays"
    torch.testing.assert_close(strided(x), original(x), rtol=1e-4, atol=1e-4)


def test_a_network_without_resnet_blocks_is_returned_unchanged():
    model = torchvision.models.mobilenet_v3_small(num_classes=3)
    types = [type(m) for m in model.modules()]
    assert fuse(model) is model
    assert [type(m) for m in model.modules()] == types
    report = fuse_report(model)
    assert not any(place.status == "fused" for place in report.places)
    norms = sum(issubclass(cls, nn.BatchNorm2d) for cls in types)
    expected = f"left   {norms} x BatchNorm2d: its place in Conv2dNormActivation is not a known one"
    assert expected in str(report)
    assert "nothing to fuse" in str(fuse_report(fuse(torchvision.models.alexnet())))


def test_a_backbone_inside_another_module():
    model = nn.ModuleDict({"body": timm.create_model("resnet10t", num_classes=0)})
    assert all(text.startswith("fused") for text in texts(fuse(model, "eager")).values())
    assert type(model["body"].bn1) is BatchNormAct
    features = timm.create_model("resnet18", features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = features(x)
    assert texts(fuse(features, "eager"))["bn1"].startswith("left: its place in FeatureListNet")
    torch.testing.assert_close(features(x), expected)


def test_our_own_networks_only_take_the_backend():
    model = fuse(build_model("micro_resnet").to(DEVICE), "triton")
    assert {m.backend for m in model.modules() if isinstance(m, BatchNormAct)} == {"triton"}
    assert texts(model)["layer2.0.bn1"] == "fused: a unit already"


def test_backends(monkeypatch):
    model = block()
    with pytest.raises(ValueError, match="unknown backend 'cuda': choose auto, eager"):
        fuse(model, "cuda")
    monkeypatch.setattr(units.kernels, "why_not_triton", lambda device=None: "no CUDA device")
    with pytest.raises(BackendUnavailable, match="no CUDA device"):
        fuse(model, "triton")
    assert type(model[0]) is BasicBlock
    monkeypatch.setattr(units.compiled, "why_not_compile", lambda: "no C++ compiler")
    report = str(fuse_report(fuse(model)))
    assert "no CUDA device and no C++ compiler: eager instead of the kernels" in report
    monkeypatch.setattr(units.compiled, "why_not_compile", lambda: None)
    report = str(fuse_report(fuse(model)))
    assert "1 of 1 parts fused, running on compile" in report
    assert "no CUDA device: torch.compile instead of the Triton kernels" in report
    assert "model.to(memory_format=torch.channels_last)" in report
    model.to(memory_format=torch.channels_last)
    assert "channels_last" not in str(fuse_report(model))


def test_the_example_of_the_readme(capsys):
    model = torchvision.models.resnet50(num_classes=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = fuse(model.to(memory_format=torch.channels_last), backend="eager")
    print(fuse_report(model))
    cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([0, 1])).backward()

    printed = capsys.readouterr().out
    assert printed.startswith("17 of 17 parts fused, running on eager\n")
    assert "  fused  stem: conv-bn-relu-maxpool\n" in printed
    assert (
        "  fused  12 x FusedBottleneck: conv-bn-relu, conv-bn-relu, conv-bn-add-relu\n" in printed
    )
    before = model.layer4[2].conv3.weight.detach().clone()
    optimizer.step()  # made before fuse: it holds the tensors the fused network trains
    assert not torch.equal(model.layer4[2].conv3.weight, before)
    assert type(model.layer4[2]) is FusedBottleneck
    assert type(fuse(block(), "eager")[0]) is FusedBasicBlock
