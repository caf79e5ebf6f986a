"""The choice of plans without a GPU: every candidate passes its check, a wrong one is refused
though it is fastest, and a site is described by what its choice depends on."""

import pytest
import torch

from kernels.choices import Rival
from kernels.select import choose
from kernels.store import Store
from models import (
    build_model,
    chosen_plans,
    launches,
    layers,
    plans,
    restore_plans,
    set_backend,
    trunk,
)
from models.plans import choose_plans, job_for, site_of
from models.trials import Site
from tests.helpers import DEVICE

CPU = torch.device("cpu")
BF16 = torch.bfloat16
IDENTITY = Site((2, 16, 6, 5), ((16, 3, 1, 1), (16, 3, 1, 1)), ("relu", "relu"), False, True, BF16)
SHORTCUT = Site(
    (2, 16, 6, 5),
    ((32, 3, 2, 1), (32, 3, 1, 1), (32, 1, 2, 0)),
    ("relu", "relu"),
    True,
    True,
    BF16,
)
PLAIN = IDENTITY._replace(adds=False)
PREACT = {
    "preact, activated": IDENTITY._replace(preact=True, acts=(None, "relu")),
    "preact, shortcut": SHORTCUT._replace(preact=True),
}


def timer(**microseconds):
    """Times as they are written down, for those that are asked for."""

    def times(calls, device):
        for of_name in calls.values():
            of_name[0]()
        return {n: Rival(microseconds[n], microseconds[n], microseconds[n] + 0.1) for n in calls}

    return times


def choice_of(site, tmp_path, **microseconds):
    times = {"P1": 10.0, "P1+statistics": 11.0, "P3": 12.0, "P3-wgrad": 11.0, "P4": 13.0}
    job = job_for(site, DEVICE)
    store = Store(tmp_path, tmp_path / "shipped")
    return choose([job], timer=timer(**times | microseconds), store=store)[0]


SITES = {"identity": IDENTITY, "shortcut": SHORTCUT, "plain": PLAIN, **PREACT}


@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_every_plan_passes_its_check_and_the_fastest_wins(site, tmp_path):
    choice = choice_of(site, tmp_path, P4=5.0)
    assert {name: rival.refused for name, rival in choice.rivals.items()} == dict.fromkeys(
        trunk.PLANS
    )
    assert choice.winner == "P4"
    assert "2.00x faster than P1" in choice.reason


def test_the_baseline_stays_within_the_spread(tmp_path):
    assert choice_of(IDENTITY, tmp_path, P3=9.9).winner == "P1"


@pytest.mark.parametrize("fault", ["data_gradient", "weight_gradient"])
def test_a_wrong_plan_is_refused_though_it_is_fastest(fault, tmp_path, monkeypatch):
    right = getattr(launches, fault)

    def wrong(*args, **options):
        found = right(*args, **options)
        (found[0] if isinstance(found, tuple) else found)[0, 0] *= 1.5
        return found

    monkeypatch.setattr(launches, fault, wrong)
    choice = choice_of(IDENTITY, tmp_path, P3=1.0, P4=1.0)
    assert choice.winner == "P1"
    for name in ("P3", "P4"):
        assert "is off by" in choice.rivals[name].refused
    assert choice.rivals["P1+statistics"].refused is None


def test_without_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(plans, "choose", None)
    sites = [IDENTITY, SHORTCUT]
    assert choose_plans(sites, CPU, measure=True) == ["P1", "P1"]


def test_sites_of_a_network(monkeypatch):
    """ResNet-34 has seven different blocks, Plain-34 too, and one more with pre-activation, whose
    first block has no norm before it; the shapes run through the network."""
    for name, preact in (("resnet34", False), ("plain34", False), ("resnet34", True)):
        model = set_backend(build_model(name, preact=preact), "triton")
        blocks = [b for number in range(1, 5) for b in getattr(model, f"layer{number}")]
        weights = (conv.weight for block in blocks for conv, _ in layers.pairs_of(block))
        shape, sites = (32, 64, 56, 56), []
        for block in blocks:
            site, shape = site_of(layers.describe(block, weights), shape)
            sites.append(site)
        assert shape == (32, 512, 7, 7)
        assert len(sites) == 16
        assert len(set(sites)) == 7 + preact


def test_a_block_can_be_told_its_plan(monkeypatch):
    model = set_backend(build_model("micro_resnet"), "triton")
    seen, run = [], trunk.run

    def listening(blocks, *rest):
        seen.extend(block.plan.name for block in blocks)
        return run(blocks, *rest)

    monkeypatch.setattr(trunk, "run", listening)
    set_backend(model.layer2, "triton", "P3")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        model.to(DEVICE)(torch.randn(2, 3, 32, 32, device=DEVICE))
    assert seen[1] == "P3"
    assert DEVICE.type == "cuda" or seen == ["P1", "P3", "P1", "P1"]


def test_a_resume_does_not_choose_anew(monkeypatch):
    """The plans travel in the checkpoint; a last, smaller batch takes those of the others."""
    model = set_backend(build_model("micro_resnet"), "triton", "P3").to(DEVICE)

    def step(model, batch):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            model(torch.randn(batch, 3, 32, 32, device=DEVICE))

    step(model, 3)
    found = chosen_plans(model)
    ((key, largest),) = found["layer1.0"].items()
    assert key.startswith("16x8x8 bfloat16")
    stems = found.pop("bn1")
    assert [(key.split()[:2], value) for key, value in stems.items()] == [
        (["stem", "training"], (3, "P3"))
    ]
    assert found == {f"layer{number}.0": {key: (3, "P3")} for number in range(1, 5)}
    found["bn1"] = stems
    assert largest == (3, "P3")
    other = set_backend(build_model("micro_resnet"), "triton", "measure").to(DEVICE)
    restore_plans(other, found)
    monkeypatch.setattr(plans, "choose_plans", None)
    monkeypatch.setattr(plans, "winners", None)
    step(other, 2)
    assert chosen_plans(other) == found
    with pytest.raises(TypeError):
        step(other, 4)  # a larger batch asks again
