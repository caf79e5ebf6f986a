"""The three launchers of a BatchNorm's backward, called one by one: a second gradient, thousands
of partials, offsets beyond 2^31."""

import pytest
import torch

from kernels import bn_passes, bn_stats, bn_sums
from kernels.activation import REFERENCE
from kernels.bn_checks import Norm
from kernels.bn_passes import apply, forward
from kernels.bn_stats import FOLD_ABOVE, Tile, statistics
from kernels.bn_sums import coefficients, frozen, kind_of, sums
from kernels.launch import INTERPRET, record
from tests.helpers import (
    DEVICE,
    as_float64,
    assert_relative_l2,
    assert_two_errors,
    fresh,
    outputs_and_gradients,
)
from tests.offsets import only_the_ends, zeros_but
from tests.test_bn_act import KINDS, draw_inputs, flat, reference

pytestmark = pytest.mark.usefixtures("poisoned")


def norms_of(inputs):
    """The Norm of x and that of the residual, or None, with the batch's statistics."""
    x, weight, bias, _, _, *residual = (value.detach() for value in inputs.values())
    norm = Norm(weight, bias, *statistics(x)[:, 0], 1e-5)
    if len(residual) < 2:
        return norm, None
    r, r_weight, r_bias, *_ = residual
    return norm, Norm(r_weight, r_bias, *statistics(r)[:, 0], 1e-3)


@pytest.mark.parametrize("act", ["relu", "gelu", "identity"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_gradient(kind, act, dtype, generator):
    """Where a residual network forks two gradients arrive: dz = (dy + dy2)*act'(z)."""
    inputs = draw_inputs(kind, (3, 21, 5, 7), dtype, generator)
    x = inputs["x"].detach()
    dy, dy2 = (torch.randn(x.shape, generator=generator).to(dtype) for _ in range(2))
    whole = dy.double() + dy2.double()
    options = {"act": act}
    truth = outputs_and_gradients(flat(reference), as_float64(inputs) | options, whole)
    eager = outputs_and_gradients(flat(reference), fresh(inputs) | options, dy + dy2)

    norm, r_norm = norms_of(inputs)
    residual = inputs["residual"].detach() if kind != "none" else None
    y, mask = forward(x, norm, residual, r_norm, act)
    saved = (residual, r_norm, mask if mask.numel() else None)
    if kind == "add" and act != "gelu":
        saved = (None, None, saved[2])
    dz, partials = sums(dy.to(DEVICE), x, norm, act, *saved, dy2=dy2.to(DEVICE))
    dparams, found = coefficients(partials, x.numel() // x.shape[1], norm, r_norm)
    dx, dr = apply(dz, x, norm, found, *((residual, r_norm) if kind == "norm" else ()))

    if act != "gelu":  # added in float32, rounded once
        passed = (y > 0) | (act == "identity")
        assert torch.equal(dz, torch.where(passed, whole.float().to(DEVICE), 0).to(dtype))
    names = ["weight", "bias", "r_weight", "r_bias"]
    ours = {"y": y, "dx": dx, "dresidual": dz if kind == "add" else dr}
    ours |= {f"d{name}": row for name, row in zip(names, dparams, strict=False)}
    for name, value in truth.items():
        atol = max(1e-6, torch.finfo(dtype).eps / 8)
        assert_two_errors(ours[name], eager[name], value, name, atol)


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_reaches_x_past_the_norm(act, dtype, generator):
    """x is normalised and added elsewhere as well, as in blocks with pre-activation: the second
    pass adds that gradient before it rounds."""
    inputs = draw_inputs("none", (3, 21, 5, 7), dtype, generator)
    x, norm = inputs["x"].detach(), norms_of(inputs)[0]
    dy, more = (torch.randn(x.shape, generator=generator).to(dtype) for _ in range(2))
    truth = outputs_and_gradients(flat(reference), as_float64(inputs) | {"act": act}, dy.double())
    _, partials = sums(dy.to(DEVICE), x, norm, act)
    _, found = coefficients(partials, x.numel() // x.shape[1], norm)
    dx, _ = apply(dy.to(DEVICE), x, norm, found, act=act, more=more.to(DEVICE))
    assert_relative_l2(dx, truth["dx"] + more.double())


def test_dz_is_written_where_it_is_a_result(generator):
    for kind in KINDS:
        inputs = draw_inputs(kind, (2, 16, 3, 5), torch.float32, generator)
        x, residual = inputs["x"].detach(), inputs.get("residual")
        norm, r_norm = norms_of(inputs)
        dz, partials = sums(x, x, norm, "gelu", residual, r_norm)
        assert (dz is None) == (kind != "add")
        assert partials.shape[0] == (3 if kind == "norm" else 2)
        _, dr, same = frozen(x, x, norm, "gelu", residual, r_norm)
        assert torch.equal(same, partials)
        assert (dr is None) == (kind == "none")
        if kind == "add":
            assert torch.equal(dr, dz)


@pytest.mark.skipif(not (INTERPRET or DEVICE.type == "cuda"), reason="needs Triton")
@pytest.mark.parametrize("partials", [1, 600, FOLD_ABOVE + 77])
@pytest.mark.parametrize("norms", [1, 2])
def test_coefficients_of_any_number_of_partials(partials, norms, generator):
    c, m, eps = 12, 10_000, 1e-3
    drawn = torch.randn(1 + norms, partials, c, generator=generator) + 0.5
    pairs = torch.rand(norms, 2, c, generator=generator) + 0.5
    both = [Norm(w.to(DEVICE), None, None, v.to(DEVICE), eps) for w, v in pairs]
    found = coefficients(drawn.to(DEVICE), m, *both)
    assert all(map(torch.equal, found, coefficients(drawn.to(DEVICE), m, *both)))
    s1, *others = drawn.double().sum(1)
    dparams, applied = [], []
    for s2, (weight, var) in zip(others, pairs.double(), strict=True):
        inv = (var + eps).rsqrt()
        dparams += [s2 * inv, s1]
        applied += [weight * inv, -weight * inv**3 * s2 / m, -weight * inv * s1 / m]
    for ours, truth in zip(found, (dparams, applied), strict=True):
        torch.testing.assert_close(ours.cpu(), torch.stack(truth).float(), rtol=2e-6, atol=2e-6)


def test_thousands_of_partials_are_folded_by_the_whole_gpu():
    norm = Norm(*(torch.empty(64, device="meta") for _ in range(4)), 1e-5)
    for count, launches in ((FOLD_ABOVE, 1), (12544, 2)):
        with record() as recording:
            coefficients(torch.empty((2, count, 64), device="meta"), 1, norm)
        assert len(recording.launches) == launches
    fold, last = recording.launches
    assert fold.grid[0] * fold.grid[1] >= 132
    assert last.args[0].shape[1] <= 512


@pytest.mark.parametrize("kind", ["add", "norm"])
def test_offsets_beyond_31_bits(kind, generator, monkeypatch):
    shape, rows = (2**25 + 3, 64, 1, 1), 35  # the smallest tiles are those of `apply`: 32 rows
    if INTERPRET:  # a program a tile, so that the last ones hold the last rows
        tiles = {2: Tile(65536, 4, 10**6)}
        monkeypatch.setattr(bn_sums, "SUMS", tiles)
        monkeypatch.setattr(bn_stats, "TILES", tiles)
    ends = [torch.randn(rows, *shape[1:], generator=generator).half().to(DEVICE) for _ in range(3)]
    norm = Norm(*(torch.rand(64, generator=generator).to(DEVICE) + 0.5 for _ in range(4)), 1e-5)
    r_norm = norm if kind == "norm" else None
    expected = {"z": sum(normalize(t, norm if i == 0 else r_norm) for i, t in enumerate(ends[:2]))}
    expected["dz"] = ends[2] * (expected["z"].half() > 0)

    with only_the_ends(bn_sums, bn_passes):
        x, r, dy = (zeros_but(end, shape) for end in ends)
        y, mask = forward(x, norm, r, r_norm, "relu")
        assert_near(y[-rows:], REFERENCE["relu"](expected["z"]))
        del y
        saved = (None, None, mask) if kind_of(r, r_norm) == "add" else (r, r_norm, None)
        dz, partials = sums(dy, x, norm, "relu", *saved)
        if kind == "add":
            assert torch.equal(dz[-rows:], expected["dz"])
        s1 = (partials[0, -2:] if INTERPRET else partials[0]).sum(0)
        assert_near(s1, expected["dz"].float().sum((0, 2, 3)))
        found = torch.rand((6, 64), generator=generator).to(DEVICE)
        args = (dz, x, norm, found) if dz is not None else (dy, x, norm, found, r, r_norm, "relu")
        for t, d, (a, b, constant) in zip(ends, apply(*args), found.split(3), strict=False):
            if d is not None:
                per = (value[:, None, None] for value in (a, b, norm.mean, constant))
                a, b, mean, constant = per
                assert_near(d[-rows:], a * expected["dz"] + b * (t - mean) + constant)


def normalize(t, norm):
    if norm is None:
        return t.float()
    weight, bias, mean, var = (value[:, None, None] for value in norm[:4])
    return (t.float() - mean) * weight * (var + norm.eps).rsqrt() + bias


def assert_near(ours, truth):
    torch.testing.assert_close(ours.float(), truth.float(), rtol=2e-3, atol=2e-3)
