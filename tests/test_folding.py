"""Folded networks compute what they did before."""

import pytest
import torch

import models
from models.units import BatchNormAct


def trained_like(name: str, **options) -> torch.nn.Module:
    """A network whose norms are far from where they start."""
    model = models.build_model(name, 5, **options)
    for module in model.modules():
        if isinstance(module, BatchNormAct):
            torch.nn.init.uniform_(module.weight, 0.3, 2)
            torch.nn.init.normal_(module.bias)
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.2, 3)
    return model.eval()


@pytest.mark.parametrize("name", ["micro_plain", "micro_resnet"])
@pytest.mark.parametrize("options", [{}, {"stem": "small", "act": "silu"}])
def test_folded_network_agrees_and_leaves_the_original(name, options):
    model = trained_like(name, **options).double()
    images = torch.randn(3, 3, 40, 40, dtype=torch.float64)
    with torch.inference_mode():
        before = model(images)
        small = models.folded(model)
        torch.testing.assert_close(small(images), before, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(model(images), before, rtol=0, atol=0)
    assert not any(norm.folded for norm in model.modules() if isinstance(norm, BatchNormAct))


def test_every_norm_of_a_network_is_folded_and_has_nothing_left_to_do():
    small = models.folded(trained_like("micro_resnet"))
    norms = [module for module in small.modules() if isinstance(module, BatchNormAct)]
    assert norms
    assert all(norm.folded for norm in norms)
    for norm in norms:  # whatever they hold: it is in the convolutions now
        norm.running_mean.fill_(torch.nan)
        norm.weight.data.fill_(torch.nan)
    assert torch.isfinite(small(torch.randn(2, 3, 32, 32))).all()


def test_a_norm_that_follows_no_convolution_stays():
    model = trained_like("micro_resnet")
    model.maxpool = torch.nn.Sequential(model.maxpool, BatchNormAct(16, "identity"))
    torch.nn.init.uniform_(model.maxpool[1].running_var, 0.2, 3)
    model.eval()
    small = models.folded(model)
    assert not small.maxpool[1].folded
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(small(images), model(images), rtol=1e-4, atol=1e-4)


def test_with_preactivation_the_norms_of_sums_stay():
    model = trained_like("micro_resnet", preact=True).double()
    small = models.folded(model)
    norms = ((n, m) for n, m in small.named_modules() if isinstance(m, BatchNormAct))
    left = [n for n, m in norms if not m.folded]
    assert left == [*(f"layer{i}.0.bn1" for i in (2, 3, 4)), "norm"]
    images = torch.randn(3, 3, 40, 40, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(small(images), model(images), rtol=1e-10, atol=1e-12)
