"""The scaling model against sums by hand, and the page that quotes it."""

from pathlib import Path

import pytest
import torch

from models import build_model
from profiling import scaling
from profiling.scaling import Links, message, scaled
from train import distributed
from train.config import DEFAULT
from train.step import TrainingStep

ROOT = Path(__file__).resolve().parents[1]
LINKS = Links(nvlink=100.0, network=10.0, latency=10.0, memory=1000.0, machine=4)


def test_the_message_is_what_a_step_sends(monkeypatch):
    sent = []
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_", lambda tensor: sent.append(tensor) or tensor)
    model = build_model("micro_resnet", 5).train()
    step = TrainingStep(model, DEFAULT.optim, None)
    step.whole = 4
    step(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    assert [tensor.nbytes for tensor in sent] == [message(model)]


def test_a_machine_alone_uses_no_network():
    found = scaled(4, 10.0, 100_000_000, LINKS)
    assert (found.nvlink_mb, found.network_mb) == (150.0, 0.0)
    assert found.reducing == pytest.approx(1.5 + 0.06)
    assert found.packing == pytest.approx(0.4)
    assert found.efficiency == pytest.approx(10 / 11.96)
    assert found.overlapped == pytest.approx(10 / 10.4)


def test_each_gpu_sends_its_part_to_other_machines():
    found = scaled(12, 1.0, 100_000_000, LINKS)
    assert found.network_mb == pytest.approx(2 * 2 / 3 * 25)
    assert found.reducing == pytest.approx(1.5 + 10 / 3 + 0.1)
    left = 1.5 + 10 / 3 + 0.1 - 2 / 3
    assert found.overlapped == pytest.approx(1 / (1 + 0.4 + left))


def test_one_gpu_sends_nothing_and_odd_numbers_are_refused():
    assert scaled(1, 5.0, 100_000_000, LINKS).efficiency == 1
    with pytest.raises(ValueError, match="6 GPUs do not fill machines of 4"):
        scaled(6, 1.0, 1, LINKS)


def test_the_page_quotes_what_the_command_prints(capsys):
    assert scaling.main([]) == 0
    page = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) > 15
    assert [line for line in lines if line not in page] == []
