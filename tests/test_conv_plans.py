"""The choice for convolutions outside the trunk, without a GPU: every candidate passes its check, a
wrong one is refused, what is chosen is what runs, and it gives what eager gives."""

import copy

import pytest
import torch
from torch import nn

from kernels import select
from kernels.select import choose
from kernels.store import Store
from models import chosen_plans, conv_plans, plans, set_backend, units
from models.conv_plans import CANDIDATES, Site, job_for
from models.units import BatchNormAct, conv_norm_act, stem
from tests.helpers import DEVICE
from tests.test_plans import timer

BF16 = torch.bfloat16
SITES = {
    "residual": Site("inference", (2, 16, 6, 5), (32, 3, 2, 1), "relu", True, BF16),
    "shortcut": Site("inference", (2, 16, 6, 5), (32, 1, 2, 0), "identity", False, BF16),
    "stem inference": Site("stem inference", (2, 3, 9, 8), (16, 7, 2, 3), "relu", False, BF16),
    "stem training": Site("stem training", (2, 3, 9, 8), (16, 7, 2, 3), "relu", False, BF16),
}


def choice_of(site, tmp_path, **microseconds):
    times = dict.fromkeys(CANDIDATES[site.use], 10.0) | microseconds
    store = Store(tmp_path, tmp_path / "shipped")
    return choose([job_for(site, DEVICE)], timer=timer(**times), store=store)[0]


@pytest.mark.parametrize("name", SITES)
def test_every_candidate_passes_its_check_and_the_fastest_wins(name, tmp_path):
    fastest = "P3" if name == "stem training" else "P1"
    choice = choice_of(SITES[name], tmp_path, **{fastest: 5.0})
    candidates = CANDIDATES[SITES[name].use]
    assert {name: rival.refused for name, rival in choice.rivals.items()} == dict.fromkeys(
        candidates
    )
    assert choice.winner == fastest


@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_ours_is_taken_where_nothing_is_measured(site, tmp_path, monkeypatch):
    ours = "P3" if site.use == "inference" else "P1+statistics"
    job, cpu = job_for(site, DEVICE), torch.device("cpu")
    assert plans.winners([job_for(site, cpu)], cpu, measure=True) == [ours]
    store = Store(tmp_path, tmp_path / "shipped")
    assert choose([job], measure=False, store=store)[0].winner == ours


def test_a_wrong_kernel_is_refused_though_it_is_the_default(tmp_path, monkeypatch):
    right = conv_plans.in_one_kernel
    monkeypatch.setattr(conv_plans, "in_one_kernel", lambda *args: 1.05 * right(*args))
    choice = choice_of(SITES["residual"], tmp_path)
    assert choice.winner == "P1"
    assert "y is off by" in choice.rivals["P3"].refused


def test_a_wrong_weight_gradient_is_refused_though_it_is_fastest(tmp_path, monkeypatch):
    right = conv_plans.launches.weight_gradient
    monkeypatch.setattr(conv_plans.launches, "weight_gradient", lambda *a: 1.5 * right(*a))
    choice = choice_of(SITES["stem training"], tmp_path, P3=1.0)
    assert choice.winner == "P1+statistics"
    assert "gradient 0 is off by" in choice.rivals["P3"].refused


def test_show_prints_these_choices_too(tmp_path, monkeypatch, capsys):
    choice_of(SITES["residual"], tmp_path, P1=5.0)
    monkeypatch.setattr(select, "user_store", lambda folder: Store(tmp_path, tmp_path / "none"))
    assert select.main(["--show"]) == 0
    first, _, *rivals, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("inference 2x16x6x5 32x3x3/2 relu+residual, bfloat16, ")
    assert [line.split()[:2] for line in rivals] == [["P3", "10.0"], ["*", "P1"]]


def parts(c_in, c_out, size, stride, act="relu"):
    torch.manual_seed(0)
    conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False).to(DEVICE)
    norm = BatchNormAct(c_out, act).to(DEVICE)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return conv, norm


def counted(monkeypatch, name):
    calls, right = [], getattr(units.kernels, name)
    monkeypatch.setattr(units.kernels, name, lambda *a, **o: calls.append(o) or right(*a, **o))
    return calls


@pytest.mark.parametrize(("winner", "fused"), [("P3", True), ("P1", False)])
@pytest.mark.parametrize("plan", ["named", "measure"])
def test_inference_runs_what_was_chosen(plan, winner, fused, monkeypatch):
    """With a shortcut of its own choice: two kernels, or two convolutions and one pass."""
    calls, asked = counted(monkeypatch, "conv_bn_act"), []

    def winners(jobs, device, measure):
        asked.extend((job.key.what, measure) for job in jobs)
        return [winner] * len(jobs)

    monkeypatch.setattr(plans, "winners", winners)
    conv, norm = parts(16, 32, 3, 2)
    downsample = nn.Sequential(*parts(16, 32, 1, 2, "identity"))
    whole = nn.ModuleList([conv, norm, downsample]).eval()
    x = torch.randn(3, 16, 6, 5, device=DEVICE).bfloat16()
    h = torch.randn_like(x)
    with torch.no_grad(), torch.autocast(DEVICE.type, BF16):
        expected = conv_norm_act(conv, norm, h, x, downsample)
        set_backend(whole, "triton", winner if plan == "named" else plan)
        y = conv_norm_act(conv, norm, h, x, downsample)
        conv_norm_act(conv, norm, h[:2], x[:2], downsample)  # a smaller batch does not ask again
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
    assert len(calls) == (4 if fused else 0)
    if plan == "named":
        assert asked == []
    else:
        assert asked == [
            ("inference 3x16x6x5 32x3x3/2 relu+residual", True),
            ("inference 3x16x6x5 32x1x1/2 identity", True),
        ]
    (settled,) = (chosen for name, chosen in chosen_plans(whole).items() if name == "1")
    assert [value for _, value in settled.items()] == [(3, winner)]


@pytest.mark.parametrize(
    ("winner", "ours", "own_wgrad"),
    [("P1", 0, None), ("P1+statistics", 1, False), ("P3", 1, True)],
)
def test_the_stem_trains_on_what_was_chosen(winner, ours, own_wgrad, monkeypatch):
    calls = counted(monkeypatch, "conv_stats")
    monkeypatch.setattr(plans, "winners", lambda jobs, *_, **__: [winner])
    conv, norm = parts(3, 16, 7, 2)
    pool, x = nn.MaxPool2d(3, 2, 1), torch.randn(2, 3, 9, 8, device=DEVICE)
    eager = copy.deepcopy(norm)
    set_backend(norm, "triton")
    found = []
    for one in (eager, norm):
        with torch.autocast(DEVICE.type, BF16):
            y = stem(conv, one, pool, x)
        dw, dgamma = torch.autograd.grad((y.float() ** 2).sum(), [conv.weight, one.weight])
        found.append((y, dw, dgamma, one.running_mean, one.running_var))
    for expected, value in zip(*found, strict=True):
        assert (value - expected).float().norm() <= 3e-2 * expected.float().norm()
    assert [options["own_wgrad"] for options in calls] == [own_wgrad] * ours
    assert [key.split()[:2] for key in norm.chosen] == [["stem", "training"]]
    norm.eval()
    with torch.no_grad(), torch.autocast(DEVICE.type, BF16):
        stem(conv, norm, pool, x)
    assert [key.split()[:2] for key in norm.chosen][1] == ["stem", "inference"]
