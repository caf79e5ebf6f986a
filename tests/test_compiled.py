"""The compiled CPU passes against eager PyTorch and float64."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels.activation import ACTS, REFERENCE
from models import compiled
from tests.helpers import check_against_float64, error, fresh, outputs_and_gradients

EPS = 1e-5


def eager(x, weight, bias, residual=None, r_weight=None, r_bias=None, act="relu", running=None):
    """Plain PyTorch in any dtype, with torch's own gradients; `running` means evaluation."""

    def norm(x, weight, bias):
        mean, var = (r.to(weight.dtype) for r in running) if running else (None, None)
        return F.batch_norm(x, mean, var, weight, bias, running is None, 0.0, EPS)

    y = norm(x, weight, bias)
    if r_weight is not None:
        residual = norm(residual, r_weight, r_bias)
    return REFERENCE[act](y if residual is None else y + residual)


def fused(x, weight, bias, residual=None, r_weight=None, r_bias=None, act="relu", running=None):
    mean, var = running or (None, None)
    return compiled.bn_act(
        x,
        weight,
        bias,
        mean,
        var,
        residual=residual,
        residual_norm=None if r_weight is None else (r_weight, r_bias, mean, var, EPS),
        act=act,
        training=running is None,
        eps=EPS,
    )


def make_inputs(shape, dtype, generator, kind="none", mean=0.0):
    """x, weight, bias and what the kind of residual needs: none, identity or norm."""

    def image():
        values = torch.randn(shape, generator=generator) + mean
        return values.to(dtype, memory_format=torch.channels_last).requires_grad_()

    def channels(low):
        return (torch.rand(shape[1], generator=generator) + low).requires_grad_()

    inputs = {"x": image(), "weight": channels(0.5), "bias": channels(-0.5)}
    if kind != "none":
        inputs["residual"] = image()
    if kind == "norm":
        inputs |= {"r_weight": channels(0.5), "r_bias": channels(-0.5)}
    return inputs


@pytest.mark.parametrize("kind", ["none", "identity", "norm"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 64, 6, 7), torch.bfloat16),
        ((2, 128, 5, 3), torch.bfloat16),
        ((3, 5, 4, 9), torch.float32),
        ((1, 24, 7, 5), torch.float32),
        ((9, 20, 1, 1), torch.float32),
        ((9, 64, 1, 1), torch.bfloat16),
    ],
)
def test_outputs_and_gradients_keep_to_the_two_error_rule(shape, dtype, kind, generator):
    check_against_float64(fused, eager, make_inputs(shape, dtype, generator, kind), generator)


@pytest.mark.parametrize("act", [act for act in ACTS if act != "relu"])
def test_every_activation(act, generator):
    inputs = make_inputs((3, 5, 4, 9), torch.float32, generator, "identity")
    check_against_float64(
        lambda **kw: fused(**kw, act=act), lambda **kw: eager(**kw, act=act), inputs, generator
    )


@pytest.mark.parametrize("kind", ["none", "norm"])
def test_evaluation_takes_the_running_statistics_as_constants(kind, generator):
    inputs = make_inputs((3, 5, 4, 9), torch.float32, generator, kind)
    running = (torch.randn(5, generator=generator), torch.rand(5, generator=generator) + 0.5)
    y, mean, var = fused(**inputs, running=running)[:3]
    assert mean is None
    assert var is None
    assert y.dtype == torch.float32
    check_against_float64(
        lambda **kw: fused(**kw, running=running),
        lambda **kw: eager(**kw, running=running),
        inputs,
        generator,
    )


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 64, 9, 28), torch.float32), ((32, 5, 16, 16), torch.float32)]
)
def test_variance_survives_a_mean_of_a_hundred_deviations(shape, dtype, generator):
    inputs = make_inputs(shape, dtype, generator, mean=100.0)
    _, mean, var = fused(**inputs)
    x = inputs["x"].detach().double()
    true_mean, true_var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    assert error(mean, true_mean) <= 1e-6 * (1 + 100)
    assert error(var / true_var, torch.ones_like(true_var)) <= 1e-5
    check_against_float64(fused, eager, inputs, generator)


def test_constant_dead_and_huge_channels(generator):
    inputs = make_inputs((3, 5, 4, 9), torch.float32, generator)
    with torch.no_grad():
        inputs["x"][:, 0], inputs["x"][:, 1] = 7.3, 0.0
        inputs["x"][:, 2] *= 1e8
    y, mean, var = fused(**inputs)
    assert var[0] + EPS == pytest.approx(EPS, rel=1e-5)
    assert var[1] == 0
    assert mean[1] == 0
    torch.testing.assert_close(y[:, 1], inputs["bias"][1].clamp_min(0).expand_as(y[:, 1]))
    check_against_float64(fused, eager, inputs, generator)


def test_nan_is_not_hidden_by_relu(generator):
    inputs = make_inputs((3, 5, 4, 9), torch.float32, generator)
    with torch.no_grad():
        inputs["x"][0, 3, 0, 0] = float("nan")
    y, _, var = fused(**inputs)
    assert y[:, 3].isnan().all()
    assert var.isnan().tolist() == [False, False, False, True, False]
    assert y[:, :3].isfinite().all()


@pytest.mark.parametrize(
    "layout",
    [
        lambda dy: dy.contiguous(),
        lambda dy: dy[:, :, :1, :1].expand_as(dy),
        lambda dy: dy.flip(3).transpose(2, 3).contiguous().transpose(2, 3),
    ],
    ids=["nchw", "expanded", "transposed"],
)
def test_layouts_of_the_gradient_and_the_input(layout, generator):
    inputs = make_inputs((3, 5, 4, 9), torch.float32, generator, "identity")
    dy = layout(torch.randn((3, 5, 4, 9), generator=generator))
    ours = outputs_and_gradients(fused, fresh(inputs), dy)
    same = outputs_and_gradients(
        fused, fresh(inputs), dy.contiguous(memory_format=torch.channels_last)
    )
    nchw = {n: v.detach().contiguous().requires_grad_() for n, v in inputs.items()}
    copied = outputs_and_gradients(fused, nchw, dy)
    for name, value in same.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
        torch.testing.assert_close(copied[name], value, rtol=0, atol=0)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    assert ours["dx"].is_contiguous(memory_format=torch.channels_last)


class Micro(nn.Module):
    """Two residual blocks, one with a shortcut convolution, on torch's modules or on `bn_act`."""

    def __init__(self, use_fused: bool):
        super().__init__()
        self.use_fused = use_fused
        sizes = [(3, 8, 1), (8, 8, 1), (8, 8, 1), (8, 12, 2), (12, 12, 1)]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride, padding=1, bias=False) for i, o, stride in sizes
        )
        self.shortcut = nn.Conv2d(8, 12, 1, 2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (8, 8, 8, 12, 12, 12))
        self.head = nn.Linear(12, 5)

    def norm(self, index, x, residual=None, shortcut=None):
        bn = self.norms[index]
        r_norm = None if shortcut is None else self.norms[shortcut]
        named = {"r_weight": r_norm.weight, "r_bias": r_norm.bias} if r_norm else {}
        function = fused if self.use_fused else eager
        y = function(x, bn.weight, bn.bias, residual, **named)
        return y[0] if self.use_fused else y

    def forward(self, x):
        x = self.norm(0, self.convs[0](x))
        x = self.norm(2, self.convs[2](self.norm(1, self.convs[1](x))), x)
        branch = self.norm(3, self.convs[3](x))
        x = self.norm(4, self.convs[4](branch), self.shortcut(x), shortcut=5)
        return self.head(x.mean((2, 3)))


def train(model, steps, forward=None):
    torch.manual_seed(1)
    x = torch.randn(6, 3, 10, 10).contiguous(memory_format=torch.channels_last)
    target = torch.arange(6) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    forward = model if forward is None else forward
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def make_micro(use_fused):
    torch.manual_seed(0)
    return Micro(use_fused).to(memory_format=torch.channels_last)


def test_five_steps_of_sgd_as_eager():
    ours, plain = make_micro(True), make_micro(False)
    assert train(ours, 5) == pytest.approx(train(plain, 5), rel=1e-4)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_no_graph_break_inside_a_compiled_model():
    model = make_micro(True)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert train(model, 2, whole) == pytest.approx(train(make_micro(False), 2), rel=1e-4)


def test_one_graph_serves_every_shape(generator):
    passes = compiled._compiled(torch.get_num_threads())

    def run(shape):
        inputs = make_inputs(shape, torch.float32, generator)
        outputs_and_gradients(fused, inputs, torch.randn(shape))

    run((3, 5, 4, 9))
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in [(2, 7, 3, 11), (5, 12, 13, 2), (1, 18, 6, 6)]:
            run(shape)
    assert passes is compiled._compiled(torch.get_num_threads())


ONE_PASS = """
import sys
import torch
from models import compiled
torch.set_num_threads(int(sys.argv[1]))
x = torch.randn(64, 56, 64)
compiled._passes(x).sums(x, torch.ones(64), 1e-5)
"""


def test_code_for_other_numbers_of_threads_is_not_taken_from_the_cache(tmp_path):
    """On one processor, code that starts two threads takes three times as long."""
    settings = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    sources = set()

    def written(threads):
        command = [sys.executable, "-W", "ignore", "-c", ONE_PASS, str(threads)]
        subprocess.run(command, check=True, env=settings, capture_output=True)
        found = set(tmp_path.rglob("*.cpp")) - sources
        sources.update(found)
        return "".join(source.read_text() for source in found)

    assert "num_threads(2)" in written(2)
    assert written(2) == ""
    alone = written(1)
    assert "#include" in alone
    assert "num_threads" not in alone


def test_second_derivatives_are_refused(generator):
    inputs = make_inputs((3, 5, 4, 9), torch.float32, generator)
    y, *_ = fused(**inputs)
    (dx,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_why_not_compile_names_the_missing_compiler(monkeypatch):
    assert compiled.why_not_compile() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in compiled.why_not_compile()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in compiled.why_not_compile()


FAULTS = """
import resource
from models import compiled
{call}
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.empty(n * 2**20).fill_(1.0) for n in (12, 3, 12, 3, 6, 6)]
    kept = [tensor + 1 for tensor in kept]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum([faults() for _ in range(12)][-4:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_tuned_allocator_reuses_pages_once_it_has_settled():
    def page_faults(call):
        command = [sys.executable, "-W", "ignore", "-c", FAULTS.format(call=call)]
        # glibc's thresholds fixed at their defaults: left alone, they grow, in some runs far enough
        fixed = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "131072")
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | fixed
        )
        return int(result.stdout)

    assert 10 * page_faults("compiled.tune_allocator()") < page_faults("")
