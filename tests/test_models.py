"""The networks against torchvision, their parameter counts, initialisation and backends."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision

from models import (
    MODELS,
    BackendUnavailable,
    build_model,
    parameter_counts,
    resolve_backend,
    set_backend,
    units,
)
from models.blocks import PreActBlock
from models.units import BatchNormAct
from tests.helpers import DEVICE, assert_two_errors

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet34(num_classes=5)
    ours = build_model("resnet34")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def test_parameter_counts():
    assert parameter_counts(build_model("resnet34")) == (21_287_237, 21_287_237)
    assert parameter_counts(build_model("plain34")) == (21_113_413, 21_113_413)
    assert parameter_counts(build_model("resnet18"))[0] == 11_179_077
    names = build_model("plain34").state_dict()
    assert not any("downsample" in name for name in names)


def test_state_dict_is_torchvisions(pair):
    ours, theirs = pair
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_outputs_equal_torchvision(pair):
    ours, theirs = pair
    x = torch.randn(2, 3, 64, 64)
    for training in (False, True):
        ours.train(training), theirs.train(training)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-5)


def test_gradients_equal_torchvision(pair):
    """Two-error rule: ours in float32 is as near to float64 as torchvision's float32."""
    ours, theirs = (copy.deepcopy(model).train() for model in pair)
    truth = copy.deepcopy(theirs).double()
    x, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    for model in (ours, theirs, truth):
        dtype = next(model.parameters()).dtype
        torch.nn.functional.cross_entropy(model(x.to(dtype)), labels).backward()
    found, eager, exact = (
        {name: p.grad for name, p in model.named_parameters()} for model in (ours, theirs, truth)
    )
    for name, gradient in exact.items():
        assert_two_errors(found[name], eager[name], gradient, name, atol=1e-5)


def test_plain_is_resnet_without_shortcuts():
    """The same weights: a plain block is the residual one before its addition."""
    torch.manual_seed(0)
    plain, residual = build_model("plain18"), build_model("resnet18")
    shared = {n: v for n, v in residual.state_dict().items() if "downsample" not in n}
    plain.load_state_dict(shared, strict=True)
    block, twin = plain.layer1[0], residual.layer1[0]
    x = torch.randn(2, 64, 8, 8)
    block.bn2.act = "identity"
    torch.testing.assert_close(twin(x), torch.relu(block(x) + x))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_a_step(name):
    if name not in ("micro_plain", "micro_resnet"):
        return_shape = build_model(name, 7).fc.out_features
        assert return_shape == 7
        return
    model = build_model(name, 3, dropout=0.1, act="leaky_relu", stem="small")
    loss = model(torch.randn(2, 3, 32, 32)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_initialisation():
    torch.manual_seed(0)
    weight = build_model("resnet18").layer3[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    weight = build_model("resnet18", init="xavier").layer3[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (2 * 256 * 9)) ** 0.5, rel=0.01)
    assert build_model("micro_plain", init="zeros").conv1.weight.abs().max() == 0
    assert build_model("micro_plain", init="constant").fc.weight.unique().numel() == 1
    zeroed = build_model("micro_resnet", zero_init_residual=True)
    assert zeroed.layer1[0].bn2.weight.abs().max() == 0
    assert zeroed.layer1[0].bn1.weight.min() == 1


def he_2016(state, x):
    """Logits of a pre-activation network with these tensors, in plain functions (He et al. 2016,
    section 3 and appendix): the first activation comes right after the stem's convolution, before
    the first unit forks; the last sum has one of its own; 1x1 shortcuts read what is activated."""

    def norm(name, x):
        affine = (state[f"{name}.{part}"] for part in ("weight", "bias"))
        return F.relu(F.batch_norm(x, None, None, *affine, training=True))

    def conv(name, x, **steps):
        return F.conv2d(x, state[f"{name}.weight"], **steps)

    x = F.max_pool2d(norm("bn1", conv("conv1", x, stride=2, padding=3)), 3, 2, 1)
    units = sorted({".".join(name.split(".")[:2]) for name in state if name.startswith("layer")})
    for unit in units:
        shrinks = unit.endswith(".0") and not unit.startswith("layer1")
        h = x if unit == "layer1.0" else norm(f"{unit}.bn1", x)
        shortcut = conv(f"{unit}.downsample.0", h, stride=2) if shrinks else x
        h = conv(f"{unit}.conv1", h, stride=2 if shrinks else 1, padding=1)
        x = conv(f"{unit}.conv2", norm(f"{unit}.bn2", h), padding=1) + shortcut
    x = norm("norm", x).mean((2, 3))
    return F.linear(x, state["fc.weight"], state["fc.bias"])


def spread_norms(model):
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "fc" not in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)


def test_preactivation_is_that_of_the_paper():
    model = build_model("resnet18", preact=True)
    spread_norms(model)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), he_2016(dict(model.named_parameters()), x))
    # no norm in the shortcuts and in the first block, one at the end, those of a block before its
    # convolutions: 1,792 fewer
    assert parameter_counts(build_model("resnet34", preact=True))[0] == 21_287_237 - 1_792


@pytest.mark.parametrize(("c_in", "stride"), [(32, 1), (16, 2)])
def test_preactivation_block_is_timms(c_in, stride):
    resnetv2 = pytest.importorskip("timm.models.resnetv2")
    layers = pytest.importorskip("timm.layers")
    ours = PreActBlock(c_in, 32, stride, "relu")
    spread_norms(ours)
    theirs = resnetv2.PreActBasic(
        c_in,
        32,
        stride=stride,
        conv_layer=layers.create_conv2d,
        norm_layer=layers.BatchNormAct2d,
        proj_layer=resnetv2.DownsampleConv,
    )
    names = {"bn1": "norm1", "bn2": "norm2", "downsample.0": "downsample.conv"}
    state = {}
    for name, value in ours.state_dict().items():
        part, _, last = name.rpartition(".")
        state[f"{names.get(part, part)}.{last}"] = value
    theirs.load_state_dict(state, strict=True)
    x = torch.randn(2, c_in, 9, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_zero_init_residual_starts_preactivation_blocks_as_identities():
    """No norm is last there: the convolution is."""
    model = build_model("micro_resnet", preact=True, zero_init_residual=True)
    block = model.layer1[0]
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(block(x), x)
    assert block.bn2.weight.min() == 1


def test_wrong_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="resnet34"):
        build_model("resnet35")
    for flag in ("zero_init_residual", "preact"):
        with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} needs residual blocks"):
            build_model("micro_plain", **{flag: True})


@pytest.mark.parametrize("preact", [False, True])
def test_no_graph_breaks(preact):
    model = build_model("micro_resnet", preact=preact)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("micro_plain", "compile"),
        ("micro_plain", "triton"),
        ("micro_resnet", "compile"),
        ("micro_resnet", "triton"),
        ("micro_resnet+preact", "compile"),  # triton: its plans are tested in test_trunk
    ],
)
def test_backends_train_alike(name, backend):
    """Step after step the losses, weights and running statistics stay those of eager."""
    device = DEVICE if backend == "triton" else CPU
    torch.manual_seed(0)
    name, _, preact = name.partition("+")
    eager = build_model(name, 3, preact=bool(preact))
    eager = eager.to(device, memory_format=torch.channels_last)
    other = set_backend(copy.deepcopy(eager), backend)
    data = [
        (torch.randn(4, 3, 32, 32, device=device), torch.randint(0, 3, (4,), device=device))
        for _ in range(20)
    ]
    losses = []
    for model in (eager, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=2e-4, momentum=0.9)
        losses.append([])
        for x, labels in data:
            loss = torch.nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3, abs=2e-4)
    for (key, value), expected in zip(
        other.state_dict().items(), eager.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(
            value, expected, rtol=5e-3, atol=5e-3, msg=lambda m, key=key: f"{key}: {m}"
        )
    eager.eval(), other.eval()
    torch.testing.assert_close(other(data[0][0]), eager(data[0][0]), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("backend", ["compile", "triton"])
def test_running_statistics_as_batch_norm(backend, momentum):
    torch.manual_seed(0)
    device = DEVICE if backend == "triton" else CPU
    ours = BatchNormAct(8, "identity", momentum=momentum).to(device)
    ours.backend = backend
    theirs = torch.nn.BatchNorm2d(8, momentum=momentum).to(device)
    for _ in range(3):
        x = torch.randn(3, 8, 5, 5, device=device) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert ours.num_batches_tracked == 3
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stem_takes_statistics_from_its_convolution(dtype, monkeypatch):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    pool = torch.nn.MaxPool2d(3, 2, 1)
    eager = BatchNormAct(8)
    ours = set_backend(copy.deepcopy(eager), "triton")
    x, calls, conv_stats = torch.randn(2, 3, 19, 18), [], units.kernels.conv_stats

    def counted(*args, **options):
        calls.append(args)
        return conv_stats(*args, **options)

    monkeypatch.setattr(units.kernels, "conv_stats", counted)
    results = []
    for norm in (eager, ours):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = units.stem(conv, norm, pool, x)
        (y.float() ** 2).sum().backward()
        results.append((y, conv.weight.grad, norm.weight.grad, norm.running_mean, norm.running_var))
        conv.weight.grad = None
    tolerance = 5e-5 if dtype == torch.float32 else 3e-2
    for value, expected in zip(results[1], results[0], strict=True):
        assert value.dtype == expected.dtype
        away = (value.float() - expected.float()).norm()
        assert away <= tolerance * expected.float().norm()
    assert len(calls) == (dtype == torch.bfloat16)
    ours.eval(), eager.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            units.stem(conv, ours, pool, x), units.stem(conv, eager, pool, x), rtol=1e-4, atol=1e-4
        )


def test_one_value_per_channel_is_refused():
    norm = BatchNormAct(8)
    norm.backend = "compile"
    with pytest.raises(ValueError, match="more than one value per channel"):
        norm(torch.randn(1, 8, 1, 1))


class TestBackendLine:
    """Every way `--fused` and `--backend` can be answered, and that each says why."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch):
        self.no_kernels, self.no_compiler = "no CUDA device", None
        monkeypatch.setattr(units.kernels, "why_not_triton", lambda device=None: self.no_kernels)
        monkeypatch.setattr(units.compiled, "why_not_compile", lambda: self.no_compiler)

    def test_eager_unless_asked(self):
        assert resolve_backend("eager", CPU).name == "eager"

    def test_auto_compiles_without_cuda(self):
        found = resolve_backend("auto", CPU)
        assert found.name == "compile"
        assert found.reason == "no CUDA device: torch.compile instead of the Triton kernels"

    def test_auto_names_an_old_driver(self):
        self.no_kernels = "the GPU driver supports CUDA 12.2, too old for this torch (CUDA 13.0)"
        assert "driver supports CUDA 12.2" in resolve_backend("auto", CPU).reason

    def test_auto_is_eager_without_a_compiler(self):
        self.no_compiler = "no C++ compiler"
        found = resolve_backend("auto", CPU)
        assert found.name == "eager"
        assert "no CUDA device and no C++ compiler" in found.reason

    def test_auto_does_not_compile_for_a_short_run(self):
        short = resolve_backend("auto", CPU, training_images=100)
        assert short.name == "eager"
        assert "save only" in short.reason
        assert resolve_backend("auto", CPU, training_images=1e6).name == "compile"

    def test_demanded_backends_stop_with_the_reason(self):
        with pytest.raises(BackendUnavailable, match="no CUDA device"):
            resolve_backend("triton", CPU)
        self.no_compiler = "no C++ compiler"
        with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler"):
            resolve_backend("compile", CPU)

    def test_triton_where_it_runs(self):
        self.no_kernels = None
        assert resolve_backend("triton", CPU).name == "triton"
