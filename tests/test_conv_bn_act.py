"""conv_bn_act against float64: the product with its epilogue, op contracts, bad inputs."""

import pytest
import torch
import torch.nn.functional as F

from kernels.activation import ACTS
from kernels.bn_checks import Norm
from kernels.conv_bn_act import SPEC, _op, conv_bn_act, forward, reference
from kernels.conv_gemm import FLOAT32, NARROW, SITES, SMALL_WIDE, WIDE
from kernels.launch import record
from tests.helpers import (
    CONV_SHAPES,
    DEVICE,
    DTYPES,
    as_float64,
    assert_relative_l2,
    assert_two_errors,
)

pytestmark = pytest.mark.usefixtures("poisoned", "exact_float32")
X, WEIGHT = torch.zeros(2, 8, 5, 5), torch.zeros(16, 8, 3, 3)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_matches_float64(act, dtype, generator):
    for shape, with_residual in zip(CONV_SHAPES[::3], (True, False, True, False), strict=True):
        inputs = SPEC.make_inputs(shape, dtype, DEVICE, generator)
        inputs["residual"] = inputs["residual"] if with_residual else None
        y = conv_bn_act(**inputs, act=act)
        truth = reference(**as_float64(inputs), act=act)
        assert_relative_l2(y, truth)
        assert_two_errors(y, reference(**inputs, act=act), truth, f"y {shape}")
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_the_reference_is_torchs_modules(generator):
    conv, norm = torch.nn.Conv2d(8, 16, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(16).eval()
    for value in (*norm.parameters(), norm.running_mean, norm.running_var):
        torch.nn.init.uniform_(value, 0.5, 2.0, generator=generator)
    x = torch.randn(2, 8, 5, 6, generator=generator)
    r = torch.randn(2, 16, 3, 3, generator=generator)
    affine = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    y = reference(x, conv.weight, *affine, r, 2, 1, "silu", norm.eps)
    torch.testing.assert_close(y, F.silu(norm(conv(x)) + r))


def test_norm_in_the_type_of_x_and_under_autocast(generator):
    inputs = SPEC.make_inputs((2, 8, 5, 5, 16, 3, 1, 1), torch.float16, DEVICE, generator)
    names = ("bn_weight", "bn_bias", "running_mean", "running_var")
    halves = inputs | {name: inputs[name].half() for name in names}
    assert_relative_l2(conv_bn_act(**halves), reference(**as_float64(halves)))
    singles = inputs | {name: inputs[name].float() for name in ("x", "weight")}
    with torch.autocast(DEVICE.type, torch.float16):
        assert torch.equal(conv_bn_act(**singles), conv_bn_act(**inputs))


def test_inference_refuses_a_gradient(generator):
    inputs = SPEC.make_inputs((1, 8, 3, 3, 8, 1, 1, 0), torch.float32, DEVICE, generator)
    inputs["weight"].requires_grad_()
    y = conv_bn_act(**inputs)
    with pytest.raises(RuntimeError, match="for inference and has no gradient"):
        y.sum().backward()


def test_torch_compile_of_inference(generator):
    shape = (1, 8, 4, 4, 8, 3, 1, 1)
    inputs = SPEC.make_inputs(shape, torch.float32, DEVICE, generator)
    compiled = torch.compile(conv_bn_act, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), conv_bn_act(**inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bn_weight": torch.ones(8)}, r"bn_weight \(8,\)"),
        ({"running_var": torch.ones(16).half()}, "running_var .* must be .16. float32"),
        ({"residual": torch.ones(2, 16, 5, 5)}, r"must be \(2, 16, 3, 3\)"),
        ({"residual": torch.ones(2, 16, 3, 3).half()}, "residual .*float16"),
        ({"act": "swoosh"}, "one of"),
    ],
)
def test_bad_inference_input_is_named(change, message):
    names = ("bn_weight", "bn_bias", "running_mean", "running_var")
    inputs = {"x": X, "weight": WEIGHT, **dict.fromkeys(names, torch.ones(16))}
    with pytest.raises(ValueError, match=message):
        conv_bn_act(**{**inputs, **change})


@pytest.mark.parametrize("tile", dict.fromkeys((*WIDE, *NARROW, *SMALL_WIDE, *FLOAT32)), ids=str)
def test_every_tile(tile, generator):
    """More than one tile each way, the last ones partly filled."""
    inputs = SPEC.make_inputs((2, 24, 13, 12, 136, 3, 1, 1), torch.float16, DEVICE, generator)
    x, weight, stride, padding, *norm, residual = inputs.values()
    y = forward(x, weight, Norm(*norm, 1e-5), residual, stride, padding, "identity", tile)
    assert_relative_l2(y, reference(**as_float64(inputs), act="identity"))


def test_empty_batch():
    x, ones = torch.empty(0, 8, 5, 5, device=DEVICE), torch.ones(16, device=DEVICE)
    assert conv_bn_act(x, WEIGHT.to(DEVICE), *[ones] * 4).shape == (0, 16, 3, 3)


def test_opcheck(generator):
    for shape in (CONV_SHAPES[0], CONV_SHAPES[4]):
        inputs = SPEC.make_inputs(shape, torch.float32, DEVICE, generator)
        x, weight, stride, padding, *norm, residual = inputs.values()
        torch.library.opcheck(_op, (x, weight, *norm, residual, stride, padding, "relu", 1e-5))


def test_one_launch_a_site():
    """The stem packs its image and its filters first."""
    for n, c, h, w, k, r, stride, padding in SITES:
        x = torch.empty(n, c, h, w, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(k, c, r, r, dtype=torch.bfloat16, device="meta")
        norm = Norm(*[torch.empty(k, device="meta")] * 4, 1e-5)
        with record() as recording:
            forward(x, weight, norm, None, stride, padding, "relu")
        names = [launched.kernel.__name__ for launched in recording.launches]
        pack = ["_pack_kernel"] * 2 if c == 3 else []
        assert names == [*pack, "_conv_kernel"]
