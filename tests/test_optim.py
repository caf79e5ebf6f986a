"""Schedules, moving average and loss scale against PyTorch's own; what a skipped step leaves."""

from dataclasses import replace

import pytest
import torch
from torch.optim import lr_scheduler

from models import build_model
from tests.helpers import SGD
from train.optim import LossScale, WeightAverage, build_optimizer, learning_rate, set_rate

OPTIM = replace(SGD, lr=0.7)
YES, NO = torch.ones(()), torch.zeros(())


def torch_schedule(name, optimizer, total):
    if name == "onecycle":
        return lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.7, total_steps=total, cycle_momentum=False
        )
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    if name == "step":
        return lr_scheduler.MultiStepLR(optimizer, [round(0.6 * total), round(0.85 * total)])
    if name == "cyclic":
        half = max(1, total // 8)
        return lr_scheduler.CyclicLR(optimizer, 0.07, 0.7, step_size_up=half, cycle_momentum=False)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)


@pytest.mark.parametrize("total", [2, 3, 7, 40, 101])
@pytest.mark.parametrize("name", ["constant", "step", "cosine", "onecycle", "cyclic"])
def test_schedules_are_torchs(name, total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    schedule = torch_schedule(name, optimizer, total)
    config = replace(OPTIM, schedule=name)
    for step in range(total):
        (expected,) = schedule.get_last_lr()
        assert learning_rate(config, step, total) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        optimizer.step()
        if step < total - 1:
            schedule.step()


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "onecycle", "cyclic"])
def test_a_run_of_one_step_has_a_learning_rate(name):
    assert learning_rate(replace(OPTIM, schedule=name), 0, 1) > 0


def test_weight_decay_spares_norms_and_biases():
    model = build_model("micro_resnet")
    groups = build_optimizer(model, SGD).param_groups
    decayed = {id(p) for p in groups[0]["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1), name


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_skipped_first_step_leaves_no_trace(kind):
    """PyTorch's own fused SGD keeps uninitialised memory as its momentum then."""
    config = replace(OPTIM, optimizer=kind)
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    skipping, plain = (build_optimizer(m, config) for m in models)
    for optimizer in (skipping, plain):
        set_rate(optimizer, 0.1)
    for p in models[0].parameters():
        p.grad = torch.full_like(p, torch.nan)
    skipping.found_inf = YES
    skipping.step()
    skipping.found_inf = NO
    for optimizer, model in zip((skipping, plain), models, strict=True):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)


def test_the_average_is_that_of_its_formula_and_can_stand_still():
    model = build_model("micro_resnet").to(memory_format=torch.channels_last)
    average = WeightAverage(model, decay=0.5)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(1, 12):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(step)
        average.prepare(step)
        before = {name: value.clone() for name, value in average.state.items()}
        average.update(YES)
        counts = [name for name in before if name.endswith("num_batches_tracked")]
        assert all(torch.equal(before[n], average.state[n]) for n in before if n not in counts)
        average.update(NO)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if name in counts:
                expected[name] = value.clone()
            else:
                expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in expected.items():
        assert torch.allclose(average.state[name], value, rtol=1e-5), name


def test_the_loss_scale_is_gradscalers():
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2000)
    ours = LossScale(torch.device("cpu"), enabled=True)
    ours.growth.fill_(1998)
    theirs.load_state_dict({**theirs.state_dict(), "_growth_tracker": 1998})
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for factor in (1.0, 2.0, 3.0, torch.inf, torch.nan, 1.0):
        loss = (parameter * factor).sum()
        theirs.scale(loss).backward()
        theirs.unscale_(optimizer)
        expected, parameter.grad = parameter.grad, None
        ours.scaled((parameter * factor).sum()).backward()
        skip = ours.unscale([parameter.grad], torch.zeros(()))
        assert skip.item() == float(not torch.isfinite(expected).all())
        assert torch.equal(parameter.grad.nan_to_num(), expected.nan_to_num())
        ours.update(skip)
        theirs.step(optimizer)
        theirs.update()
        parameter.grad = None
        assert ours.factor.item() == theirs.get_scale()
        assert ours.growth.item() == theirs.state_dict()["_growth_tracker"]
    assert ours.factor.item() == 2.0**13  # doubled once, halved twice


def test_the_loss_is_judged_with_and_without_scaling():
    for enabled in (False, True):
        scale = LossScale(torch.device("cpu"), enabled)
        for loss, skip in ((1.0, 0.0), (torch.nan, 1.0), (torch.inf, 1.0)):
            assert scale.unscale([torch.ones(2)], torch.tensor(loss)).item() == skip
    off = LossScale(torch.device("cpu"), enabled=False)
    assert off.tensors() == []
    loss = torch.tensor(2.0)
    assert off.scaled(loss) is loss
