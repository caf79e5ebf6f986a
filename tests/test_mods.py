"""Every modification against an independent composition of plain functions in float64; known
parameter counts; which kernels run, and why not the trunk; the names in lists of models."""

import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision

import kernels
from kernels.conv_bn_act import reference as conv_bn_act_reference
from models import (
    MODELS,
    build_model,
    check_model,
    compiled,
    folded,
    model_label,
    names,
    parameter_counts,
    parse_model,
    set_backend,
)
from models.layers import why_not_trunk
from models.mods import GroupNormAct, blur_pool, drop_path, groups_of
from models.units import BatchNormAct
from tests.helpers import DEVICE
from train import run
from train.config import Config, ModelConfig, check, from_dict, to_dict
from train.errors import UsageError

ALONE = ["se", "norm=group", "norm=layer", "drop-path=0.5", "shortcut=avgpool", "antialias"]
TOGETHER = "+".join(["", *ALONE[:2], *ALONE[3:], "act=silu", "stem=deep"])


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """The network with norms and biases that are far from where they start."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, *((0.5, 1.5) if "weight" in name else (-0.5, 0.5)))
    for module in model.modules():
        if isinstance(module, BatchNormAct):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.2, 3)
    return model


def composed(state, x, name, *, act="relu", norm="batch", stem="imagenet", **mods):
    """Logits of a micro network in training with these tensors, as the papers have it; the draws of
    stochastic depth are those of torchvision's, in the order of the blocks."""
    activate = getattr(F, act)
    mods = {"preact": False, "se": False, "shortcut": "conv", "antialias": False, **mods}

    def normed(site, x):
        weight, bias = state[f"{site}.weight"], state[f"{site}.bias"]
        if norm == "batch":
            mean, var = (
                x.mean((0, 2, 3), keepdim=True),
                x.var((0, 2, 3), keepdim=True, correction=0),
            )
            x = (x - mean) / (var + 1e-5).sqrt()
        else:
            n, c = x.shape[:2]
            # 16, 32, 48, 64 ... channels: the largest divisors that are no more than 32
            groups = 1 if norm == "layer" else {16: 16, 48: 24, 8: 8, 24: 24}.get(c, 32)
            parts = x.reshape(n, groups, -1)
            mean, var = parts.mean(2, keepdim=True), parts.var(2, keepdim=True, correction=0)
            x = ((parts - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
        return x * weight[:, None, None] + bias[:, None, None]

    def conv(site, x, stride=1):
        weight = state[f"{site}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def blur(x):
        line = torch.tensor([1.0, 2, 1], dtype=x.dtype) / 4
        weight = torch.outer(line, line).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1,) * 4, "replicate"), weight, stride=2, groups=x.shape[1])

    def means(x):  # of 2x2 pixels; at an odd edge of those there are
        return F.avg_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), "replicate"), 2)

    def scaled(site, x):
        if mods["se"]:
            with torch.random.fork_rng():  # its own initial weights are not used
                theirs = torchvision.ops.SqueezeExcitation(x.shape[1], x.shape[1] // 16).double()
            own = {n: state[f"{site}.se.{n}"].view_as(p) for n, p in theirs.named_parameters()}
            x = torch.func.functional_call(theirs, own, x)
        p = mods.get("drop_path", 0) * int(site[5]) / 4  # Huang et al. 2016: linear, from the first
        return torchvision.ops.stochastic_depth(x, p, "row") if p else x

    def shortcut(site, x, shrinks):
        if f"{site}.downsample.0.weight" not in state:
            return x
        if shrinks and mods["shortcut"] == "avgpool":
            return conv(f"{site}.downsample.0", means(x))
        if shrinks and mods["antialias"]:
            return conv(f"{site}.downsample.0", blur(x))
        return conv(f"{site}.downsample.0", x, 2 if shrinks else 1)

    def block(site, x, count, strided):
        shrinks = site != "layer1.0"
        first = x
        if mods["preact"] and f"{site}.bn1.weight" in state:
            first = activate(normed(f"{site}.bn1", x))
        h = first
        for i in range(1, count + 1):
            if mods["preact"] and i > 1:
                h = activate(normed(f"{site}.bn{i}", h))
            if i == count and shrinks and mods["antialias"]:
                h = blur(h)
            h = conv(f"{site}.conv{i}", h, 2 if shrinks and i == strided and not antialias else 1)
            if not mods["preact"]:
                h = normed(f"{site}.bn{i}", h)
                h = activate(h) if i < count else h
        h = scaled(site, h)
        if mods["preact"]:
            has_conv = f"{site}.downsample.0.weight" in state
            return h + shortcut(site, first if has_conv else x, shrinks)
        if name != "micro_plain":
            r = shortcut(site, x, shrinks)
            h = h + (normed(f"{site}.downsample.1", r) if r is not x else r)
        return activate(h)

    antialias = mods["antialias"]
    if stem == "deep":
        x = activate(normed("conv1.1", conv("conv1.0", x, 2)))
        x = conv("conv1.4", activate(normed("conv1.3", conv("conv1.2", x))))
    else:
        x = conv("conv1", x, 2 if stem == "imagenet" else 1)
    x = activate(normed("bn1", x))
    if stem != "small":
        x = blur(F.max_pool2d(x, 3, 1, 1)) if antialias else F.max_pool2d(x, 3, 2, 1)
    for number in range(1, 5):
        x = block(f"layer{number}.0", x, *((3, 2) if name == "micro_bottleneck" else (2, 1)))
    if mods["preact"]:
        x = activate(normed("norm", x))
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(
    "label",
    [
        *(f"micro_resnet+{mod}" for mod in [*ALONE, "stem=deep", "stem=small+antialias+width=2"]),
        *(f"micro_resnet+preact+{mod}" for mod in ALONE),
        *(f"micro_bottleneck{more}" for more in ["", "+preact", "+antialias", "+width=1.5"]),
        "micro_plain+se+antialias+norm=layer",
        "micro_resnet+shortcut=avgpool+antialias+stem=small",
        *(f"micro_{n}{TOGETHER}" for n in ["resnet", "resnet+preact", "bottleneck+preact"]),
    ],
)
def test_forward_and_gradients_are_those_of_an_independent_composition(label):
    name, options = parse_model(label)
    torch.manual_seed(0)
    model = spread(build_model(name, 3, **options)).double()
    # width changes nothing that the composition asks
    options.pop("width", None)
    state = dict(model.named_parameters())
    x = torch.randn(4, 3, 33, 38, dtype=torch.float64, requires_grad=True)
    results = []
    for network in (model, lambda x: composed(state, x, name, **options)):
        torch.manual_seed(1)
        y = network(x)
        loss = (y * torch.arange(12).view(4, 3)).sum()
        results.append((y, torch.autograd.grad(loss, [x, *state.values()])))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-9)
    for key, ours, theirs in zip(["x", *state], *(found[1] for found in results), strict=True):
        away = (ours - theirs).norm()
        assert away <= 1e-8 * max(theirs.norm(), 1e-3), f"{key}: {away} of {theirs.norm()}"


def test_known_parameter_counts():
    def count(label):
        name, options = parse_model(label)
        with torch.device("meta"):
            return parameter_counts(build_model(name, 1000, **options))[0]

    assert count("resnet50") == 25_557_032  # torchvision
    assert count("resnet34+stem=deep+shortcut=avgpool") == 21_816_904  # timm's resnet34d
    assert count("resnet50+stem=deep+shortcut=avgpool") == 25_576_264  # timm's resnet50d
    assert count("resnet50+preact") == 25_549_352  # timm's resnetv2_50
    # Hu et al. 2018, section 3: 2/r * sum of N_s * C_s^2, and here the biases
    stages = zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True)
    extra = sum(n * (2 * c * c // 16 + c // 16 + c) for n, c in stages)
    assert count("resnet34+se") - count("resnet34") == extra
    for mod in ("norm=group", "norm=layer", "antialias", "shortcut=avgpool", "drop-path=0.1"):
        assert count(f"resnet34+{mod}") == count("resnet34")


@pytest.mark.parametrize(
    ("label", "widths"),
    [
        ("resnet34+width=1.3", [80, 160, 336, 672]),
        ("micro_resnet+width=0.1", [16, 16, 16, 16]),
        ("micro_bottleneck+width=2", [4 * c for c in (32, 64, 96, 128)]),
    ],
)
def test_widths_are_multiples_of_16(label, widths):
    name, options = parse_model(label)
    with torch.device("meta"):
        model = build_model(name, **options)
    found = [model.get_submodule(f"layer{i}.0").chain()[-1][0].out_channels for i in (1, 2, 3, 4)]
    assert found == widths


def test_resnet50_is_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(num_classes=5)
    ours = build_model("resnet50")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_modifications_without_parameters_keep_torchvisions_names():
    theirs = torchvision.models.resnet34(num_classes=5).state_dict()
    ours = build_model("resnet34", antialias=True, shortcut="avgpool", drop_path=0.2)
    ours.load_state_dict(theirs, strict=True)
    other = build_model("resnet34", norm="group")
    other.load_state_dict({n: theirs[n] for n in other.state_dict()}, strict=True)


def test_state_dict_makes_the_same_network_again():
    name, options = parse_model(f"micro_resnet+preact{TOGETHER}+zero-init-residual")
    one = spread(build_model(name, **options)).eval()
    other = build_model(name, **options).eval()
    other.load_state_dict(one.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize(
    "label", ["micro_bottleneck", "micro_bottleneck+preact", "micro_resnet+se"]
)
def test_zero_init_residual_ends_the_branch_at_zero(label):
    name, options = parse_model(f"{label}+norm=group+zero-init-residual")
    block = build_model(name, **options).layer2[0]
    branch = copy.deepcopy(block)
    branch.downsample = None
    branch.adds = False
    x = torch.randn(2, block.downsample[0].in_channels, 6, 6)
    own = block(x)
    first = x if block.bn1 is None or not block.preact else block.bn1(x)
    shortcut = block.downsample(first)
    torch.testing.assert_close(own, shortcut if block.preact else torch.relu(shortcut))


def test_groups_are_32_or_the_largest_divisor():
    assert [groups_of(c) for c in (16, 32, 48, 64, 80, 112)] == [16, 32, 24, 32, 20, 28]


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 8)])
def test_blurring_keeps_constants_and_the_size_of_a_strided_convolution(size):
    x = torch.full((1, 2, *size), 3.0)
    assert torch.equal(
        blur_pool()(x), torch.full((1, 2, (size[0] + 1) // 2, (size[1] + 1) // 2), 3.0)
    )


class TestDropPath:
    def test_drops_samples_and_keeps_the_mean(self):
        y = drop_path(torch.ones(4000, 2, 1, 1), 0.3)
        assert y.unique().tolist() == pytest.approx([0, 1 / 0.7])
        assert torch.equal(y[:, 0], y[:, 1])
        assert y.mean().item() == pytest.approx(1, abs=0.04)  # 4 standard errors

    def test_grows_with_depth_and_ends_with_training(self):
        model = build_model("resnet34", drop_path=0.32)
        blocks = [b for i in (1, 2, 3, 4) for b in model.get_submodule(f"layer{i}")]
        assert [b.drop_path for b in blocks] == pytest.approx([0.02 * i for i in range(1, 17)])
        model = spread(build_model("micro_resnet", drop_path=0.9)).eval()
        other = build_model("micro_resnet").eval()
        other.load_state_dict(model.state_dict(), strict=True)
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(model(x), other(x))
        assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize("options", ["", "+preact"])
@pytest.mark.parametrize("mods", ["+norm=group", TOGETHER.replace("norm=group", "norm=batch")])
def test_folded_network_agrees(options, mods):
    name, options = parse_model(f"micro_resnet{options}{mods}")
    model = spread(build_model(name, **options)).double().eval()
    images = torch.randn(3, 3, 40, 40, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(folded(model)(images), model(images), rtol=1e-10, atol=1e-12)


def test_the_doctors_cures_are_flags():
    flags = ["--norm", "group", "--act", "leaky_relu", "--dropout", "0.3", "--stem", "small"]
    config = run.parse(flags)
    assert config.model == ModelConfig(norm="group", act="leaky_relu", dropout=0.3, stem="small")


class TestKernels:
    """What runs on Triton, and which blocks the trunk leaves to themselves, with the reason."""

    @pytest.mark.parametrize(
        "label",
        [
            "micro_resnet+norm=group+se",
            "micro_resnet+preact+norm=layer+drop-path=0.5",
            "micro_resnet+se+antialias+shortcut=avgpool+stem=deep+drop-path=0.5",
            "micro_plain+se",
        ],
    )
    def test_a_step_is_eagers(self, label):
        name, options = parse_model(label)
        torch.manual_seed(0)
        eager = spread(build_model(name, 3, **options))
        eager = eager.to(DEVICE, memory_format=torch.channels_last)
        fused = set_backend(copy.deepcopy(eager), "triton")
        exact = copy.deepcopy(eager).double()
        # interpreting GroupNorm takes long, and it knows no batch
        # the norms of two images on maps of one pixel magnify rounding, and more in so long a stem
        size = 64 if "deep" in label else 32
        x = torch.randn(1 if "group" in label else 2, 3, size, size, device=DEVICE)
        dropped = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 1]], dtype=torch.bool, device=DEVICE)
        for model in (eager, fused, exact):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("models.blocks.drop_path", fixed(dropped))
                model(x.to(next(model.parameters()).dtype)).square().sum().backward()
        found, theirs, truth = (
            {n: p.grad for n, p in model.named_parameters()} for model in (fused, eager, exact)
        )
        for key, gradient in truth.items():
            scale = gradient.norm() + 1e-6
            away, eagers = ((g[key].double() - gradient).norm() / scale for g in (found, theirs))
            assert away <= 2 * eagers + 1e-4, f"{key}: {away} against {eagers}"

    def test_compiled_step_is_eagers(self, monkeypatch):
        """Inductor's part in it is tested in test_compiled."""
        monkeypatch.setattr(compiled, "_compiled", lambda threads: compiled._PLAIN)
        torch.manual_seed(0)
        eager = spread(build_model("micro_resnet", 3, se=True, antialias=True))
        other = set_backend(copy.deepcopy(eager), "compile")
        x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
        for model in (eager, other):
            model(x).square().sum().backward()
        for (key, p), q in zip(eager.named_parameters(), other.parameters(), strict=True):
            away = (p.grad - q.grad).norm() / (p.grad.norm() + 1e-6)
            assert away < 1e-3, f"{key}: {away}"

    @pytest.mark.parametrize("label", [f"micro_resnet{TOGETHER}", "micro_bottleneck+preact+se"])
    def test_no_graph_breaks(self, label):
        name, options = parse_model(label)
        model = build_model(name, **options)
        x = torch.randn(2, 3, 32, 32)
        torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()

    @pytest.mark.parametrize(
        ("label", "reasons"),
        [
            ("micro_bottleneck", [None] * 4),
            ("micro_bottleneck+preact", [None] * 4),
            ("micro_resnet+se", ["no launches for squeeze-and-excitation"] * 4),
            ("micro_resnet+norm=group", ["their norms are no BatchNorms"] * 4),
            ("micro_resnet+drop-path=0.1", ["no launches for stochastic depth"] * 4),
            ("micro_resnet+shortcut=avgpool", [None, *["for a pooled shortcut"] * 3]),
            ("micro_plain+antialias", [None, *["for anti-aliasing"] * 3]),
            ("micro_resnet+stem=deep+width=2+act=silu", [None] * 4),
        ],
    )
    def test_what_the_trunk_takes(self, label, reasons):
        name, options = parse_model(label)
        model = set_backend(build_model(name, **options), "triton").to(DEVICE)
        for i, reason in enumerate(reasons, start=1):
            (block,) = model.get_submodule(f"layer{i}")
            x = torch.zeros(2, block.conv1.in_channels, 8, 8, dtype=torch.bfloat16, device=DEVICE)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                found = why_not_trunk(block, x)
            assert found is None if reason is None else re.search(reason, found), found

    @pytest.mark.parametrize(
        ("label", "single", "added"),
        [
            # the last convolution of a block takes the addition in where nothing stands between
            ("micro_resnet", 7, 4),
            ("micro_resnet+drop-path=0.5", 7, 4),
            ("micro_resnet+antialias+shortcut=avgpool+stem=deep", 9, 4),
            ("micro_resnet+se", 11, 0),
            ("micro_resnet+norm=group", 0, 0),
        ],
    )
    def test_inference(self, label, single, added, monkeypatch):
        name, options = parse_model(label)
        model = spread(build_model(name, **options)).eval()
        model = model.to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)
        x = torch.randn(1, 3, 32, 32, device=DEVICE, dtype=torch.bfloat16)
        with_residual = []

        def watched(x, *args, residual=None, **options):
            with_residual.append(residual is not None)
            return conv_bn_act_reference(x, *args, residual=residual, **options)

        monkeypatch.setattr(kernels, "conv_bn_act", watched)
        with torch.no_grad():
            expected = model(x).float()
            found = set_backend(model, "triton")(x).float()
        assert (found - expected).norm() <= 0.05 * expected.norm()
        assert (with_residual.count(False), with_residual.count(True)) == (single, added)

    def test_group_norm_keeps_the_type_of_its_input(self):
        norm = GroupNormAct(4, 16)
        x = torch.randn(2, 16, 5, 5, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            eager = norm(x, x)
            norm.backend = "triton"
            fused = norm(x, x) if DEVICE.type == "cpu" else eager
        assert eager.dtype == fused.dtype == torch.bfloat16
        torch.testing.assert_close(fused, eager, rtol=0.02, atol=0.02)


def fixed(dropped: torch.Tensor):
    """drop_path that takes the next row of `dropped` at every call."""
    rows = iter(dropped)

    def drop(x: torch.Tensor, p: float) -> torch.Tensor:
        return x * (~next(rows)).to(x.dtype).view(-1, 1, 1, 1) / (1 - p)

    return drop


class TestNames:
    @pytest.mark.parametrize(
        ("text", "name", "options"),
        [
            ("plain34", "plain34", {}),
            ("plain34+se", "plain34", {"se": True}),
            ("resnet34+se+preact", "resnet34", {"se": True, "preact": True}),
            ("resnet34+norm=group", "resnet34", {"norm": "group"}),
            (
                "resnet50+drop-path=0.1+width=1.5+zero-init-residual",
                "resnet50",
                {"drop_path": 0.1, "width": 1.5, "zero_init_residual": True},
            ),
        ],
    )
    def test_are_read_and_written(self, text, name, options):
        assert parse_model(text) == (name, options)
        assert parse_model(model_label(name, options)) == (name, options)
        everything = {**names.DEFAULTS, **options}
        assert model_label(name, everything) == model_label(name, options)

    def test_know_the_options_of_a_run(self):
        fields = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name != "model"}
        assert fields == names.DEFAULTS

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("resnet35+se", r"unknown model 'resnet35' in resnet35\+se: .*resnet34"),
            ("resnet34+sw", r"unknown part 'sw' of .*norm=batch\|group\|layer.* se, preact"),
            ("resnet34+drop_path=0.1", "unknown part 'drop_path=0.1' .*drop-path=NUMBER"),
            ("resnet34+norm=instance", "unknown norm 'instance': choose one of batch, group"),
            ("resnet34+norm", r"norm needs a value in .*norm=batch\|group\|layer"),
            ("resnet34+se=1", r"se takes no value .*write \+se"),
            ("resnet34+width=wide", "width=wide in .* must be a number"),
            ("resnet34+width=nan", "--width must be above 0"),
            ("resnet34+se+se", "has se twice"),
            ("plain34+preact", "--preact needs residual blocks, plain34 has none: leave it out"),
            ("resnet34+", "unknown part ''"),
        ],
    )
    def test_wrong_ones_are_refused_with_the_known_ones(self, text, words):
        with pytest.raises(ValueError, match=words):
            parse_model(text)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"drop_path": 1.0}, r"--drop-path must be in \[0, 1\), not 1.0"),
            ({"dropout": -0.1}, r"--dropout must be in \[0, 1\), not -0.1"),
            ({"width": 0.0}, "--width must be above 0, not 0.0"),
            ({"model": "plain34", "drop_path": 0.1}, "--drop-path needs residual blocks"),
            ({"model": "micro_plain", "shortcut": "avgpool"}, "--shortcut needs residual blocks"),
        ],
    )
    def test_combinations_that_mean_nothing_are_usage_errors(self, options, words):
        with pytest.raises(UsageError, match=words):
            check(Config(model=ModelConfig(**options)))
        name = options.pop("model", "resnet34")
        with pytest.raises(ValueError, match=words):
            build_model(name, **options)

    def test_plain_networks_take_the_rest(self):
        for name in MODELS:
            check_model(name, width=2.0, norm="layer", stem="deep", dropout=0.2)
        check(Config(model=ModelConfig("plain34", se=True, antialias=True)))

    def test_configuration_is_kept_and_old_ones_are_read(self):
        config = Config(model=ModelConfig("resnet50", width=1.5, se=True, norm="group"))
        values = to_dict(config)
        assert from_dict(values) == config
        values["model"] = {"model": "resnet34"}  # written before there were modifications
        assert from_dict(values).model == ModelConfig()
