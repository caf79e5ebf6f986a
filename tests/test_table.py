"""Every room and every plan of the trunk at the sizes of ResNet-34, where there is a GPU; the same
checks at small sizes run everywhere, here and in each room's own test."""

import pytest
import torch

import kernels
from kernels.shapes import RESNET34
from models import build_model, conv_plans, layers, plans, set_backend, trunk
from profiling.agree import OK
from profiling.kernel_speed import check_room
from tests.helpers import DEVICE

SMALL = {"conv_dgrad": (2, 16, 6, 5, 24, 3, 2, 1), "conv_wgrad": (2, 16, 6, 5, 24, 3, 2, 1)}
SHAPES = [(spec, shape) for spec in kernels.KERNELS for shape in spec.shapes]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("spec", "shape"), SHAPES, ids=lambda v: getattr(v, "name", str(v)))
def test_rooms_at_the_sizes_of_the_network(spec, shape, dtype, generator):
    assert check_room(spec, spec.fused, spec.make_inputs(shape, dtype, DEVICE, generator)) == OK


@pytest.mark.parametrize("name", SMALL)
def test_the_check_itself(name, generator):
    (spec,) = (spec for spec in kernels.KERNELS if spec.name == name)
    inputs = spec.make_inputs(SMALL[name], torch.bfloat16, DEVICE, generator)
    assert check_room(spec, spec.fused, inputs) == OK
    assert check_room(spec, lambda **given: 1.1 * spec.fused(**given), inputs) != OK


def sites():
    """The different blocks of ResNet-34, with pre-activation too, and Plain-34 at batch 32, 224
    pixels."""
    found = {}
    for name in ("resnet34", "plain34", "resnet34+preact"):
        name, _, preact = name.partition("+")
        model = set_backend(build_model(name, preact=bool(preact)), "triton")
        blocks = [b for number in range(1, 5) for b in getattr(model, f"layer{number}")]
        weights = (conv.weight.bfloat16() for b in blocks for conv, _ in layers.pairs_of(b))
        shape = (32, 64, 56, 56)
        for block in blocks:
            site, shape = plans.site_of(layers.describe(block, weights), shape)
            found[site] = f"{name} {preact} {'x'.join(map(str, site.shape))} to {shape[1]}"
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("plan", trunk.PLANS)
@pytest.mark.parametrize("site", sites().items(), ids=lambda item: item[1])
def test_plans_at_the_sizes_of_the_network(site, plan):
    job = plans.job_for(site[0], DEVICE)
    assert job.check(plan, job.candidates[plan](job.make_inputs(0))) is None


def single_convolutions():
    """Every convolution of ResNet-34 by itself, at batch 32, with what follows it."""
    for one in RESNET34:
        shape, geometry = (32, one.c, one.h, one.w), (one.k, one.r, one.stride, one.padding)
        for use in ("stem inference", "stem training") if one.c == 3 else ("inference",):
            residual = use == "inference" and one.r == 3 and one.stride == 1
            yield conv_plans.Site(use, shape, geometry, "relu", residual, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("site", single_convolutions(), ids=lambda site: f"{site[0]} {site[1]}")
def test_single_convolutions_at_the_sizes_of_the_network(site):
    job = conv_plans.job_for(site, DEVICE)
    for name, run in job.candidates.items():
        assert job.check(name, run(job.make_inputs(0))) is None
