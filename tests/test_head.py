"""The cross-entropy of the head against float64 and PyTorch: smoothing, mixed labels, extremes, the
number of correct answers, its op contract and its bad inputs."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from kernels.head import (
    MAX_CLASSES,
    ONE_PROGRAM,
    SPEC,
    _op,
    cross_entropy,
    forward,
    loss_and_correct,
    reference,
)
from kernels.launch import record
from tests.helpers import DEVICE, check_against_float64

pytestmark = pytest.mark.usefixtures("poisoned")

# (N, K): one sample, one class, no power of two, one program, several, more classes than its share
SHAPES = ((1, 1), (1, 5), (32, 5), (7, 101), (300, 33), (3, 5000))


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_float64(mixed, dtype, generator):
    for shape in SHAPES:
        for smoothing in (0.0, 0.1):
            inputs = SPEC.make_inputs(shape, dtype, DEVICE, generator)
            inputs["label_smoothing"] = smoothing
            if not mixed:
                inputs.pop("labels_b"), inputs.pop("lam")
            check_against_float64(cross_entropy, reference, inputs, generator)


def test_is_pytorchs_cross_entropy(generator):
    logits = torch.randn(9, 11, generator=generator).to(DEVICE)
    labels = torch.randint(11, (9,), generator=generator).to(DEVICE)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.2)
    assert torch.allclose(cross_entropy(logits, labels, 0.2), expected)
    assert cross_entropy(logits.half(), labels).dtype == torch.float32


def test_mixing_is_linear_for_one_and_for_many_lambdas(generator):
    inputs = SPEC.make_inputs((6, 7), torch.float32, DEVICE, generator)
    logits, a, b = inputs["logits"], inputs["labels"], inputs["labels_b"]
    for lam in (inputs["lam"], inputs["lam"][0], inputs["lam"][:1].expand(6)):
        each = [F.cross_entropy(logits, labels, reduction="none") for labels in (a, b)]
        expected = (lam * each[0] + (1 - lam) * each[1]).mean()
        assert torch.allclose(cross_entropy(logits, a, labels_b=b, lam=lam), expected)


def test_counts_correct_answers_and_the_first_of_a_tie():
    logits = torch.tensor([[0.0, 2, 1], [3, 0, 0], [1, 1, 1], [1, 1, 1]], device=DEVICE)
    labels = torch.tensor([1, 2, 0, 1], device=DEVICE)
    loss, correct = loss_and_correct(logits, labels)
    assert (correct.item(), correct.dtype) == (2, torch.int64)
    assert torch.allclose(loss, F.cross_entropy(logits, labels))
    many, answers = torch.eye(33, device=DEVICE).repeat(10, 1), torch.arange(33, device=DEVICE)
    assert loss_and_correct(many, answers.repeat(10))[1].item() == 330  # several programs


def test_huge_and_infinite_logits():
    logits = torch.tensor([[3e4, -3e4, 0.0], [0.0, float("-inf"), 1.0]], device=DEVICE)
    labels = torch.tensor([0, 2], device=DEVICE)
    logits.requires_grad_()
    loss = cross_entropy(logits, labels)
    assert torch.allclose(loss, F.cross_entropy(logits, labels))
    (ours,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    assert torch.allclose(ours, expected, atol=1e-7)
    assert cross_entropy(torch.full_like(logits, float("nan")), labels).isnan()


def test_scaled_float16_gradient_does_not_underflow(generator):
    inputs = SPEC.make_inputs((256, 5), torch.float16, DEVICE, generator)
    logits, labels = inputs["logits"], inputs["labels"]
    (dz,) = torch.autograd.grad(cross_entropy(logits, labels) * 65536, logits)
    z = logits.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(F.cross_entropy(z, labels) * 65536, z)
    assert ((dz.double() - truth).abs() <= 2**-10 * truth.abs() + 1e-4).all()


def test_unknown_label_is_never_silent(generator):
    logits = torch.randn(3, 4, generator=generator).to(DEVICE)
    for label in (-100, 4):
        labels = torch.tensor([0, label, 1], device=DEVICE)
        assert forward(logits, labels, 0.0, None, None)[0].isnan()


def test_empty_batch_is_nan():
    logits = torch.empty(0, 5, device=DEVICE, requires_grad=True)
    loss = cross_entropy(logits, torch.empty(0, dtype=torch.int64, device=DEVICE))
    loss.backward()
    assert loss.isnan()
    assert logits.grad.shape == (0, 5)


def test_more_classes_than_a_program_holds(generator):
    inputs = SPEC.make_inputs((2, MAX_CLASSES + 1), torch.float32, DEVICE, generator)
    check_against_float64(cross_entropy, reference, inputs, generator)


def test_without_triton_it_is_the_reference(monkeypatch, generator):
    module = importlib.import_module("kernels.head")
    monkeypatch.setattr(module, "runs_triton", lambda tensor: False)
    for extra in ({}, {"labels_b": None, "lam": None}):
        inputs = {**SPEC.make_inputs((6, 7), torch.bfloat16, DEVICE, generator), **extra}
        check_against_float64(cross_entropy, reference, inputs, generator)


def test_accepts_any_strides(generator):
    logits = torch.randn(5, 6, generator=generator).to(DEVICE).t().requires_grad_()
    labels = torch.arange(12, device=DEVICE)[::2] % 5
    cross_entropy(logits, labels).backward()
    z = logits.detach().clone().requires_grad_()
    F.cross_entropy(z, labels).backward()
    assert torch.allclose(logits.grad, z.grad, atol=1e-7)


def test_opcheck(generator):
    inputs = SPEC.make_inputs((4, 6), torch.float32, DEVICE, generator)
    logits, labels = inputs["logits"], inputs["labels"]
    torch.library.opcheck(_op, (logits, labels, 0.1, None, None))
    torch.library.opcheck(_op, (logits, labels, 0.0, inputs["labels_b"], inputs["lam"]))


def test_torch_compile_goes_through(generator):
    inputs = SPEC.make_inputs((4, 6), torch.float32, DEVICE, generator)
    logits, labels = inputs["logits"], inputs["labels"]
    compiled = torch.compile(
        lambda z, labels: loss_and_correct(z * 2, labels, 0.1), fullgraph=True, backend="aot_eager"
    )
    loss, correct = compiled(logits, labels)
    expected = F.cross_entropy(logits * 2, labels, label_smoothing=0.1)
    assert torch.allclose(loss, expected)
    assert correct == (logits.argmax(dim=1) == labels).sum()
    (ours,) = torch.autograd.grad(loss, logits)
    (truth,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(ours, truth, atol=1e-7)


def test_launches_and_the_same_sum_twice(generator):
    for (n, k), launches in (((32, 5), 1), ((ONE_PROGRAM // 8, 5), 1), ((32, 1000), 16)):
        logits, labels = torch.empty(n, k, device="meta"), torch.empty(n, device="meta").long()
        with record() as recording:
            forward(logits, labels, 0.1, None, None)
        assert [launch.grid for launch in recording.launches] == [(launches,)]
    inputs = SPEC.make_inputs((300, 33), torch.float32, DEVICE, generator)
    assert torch.equal(cross_entropy(**inputs), cross_entropy(**inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4)}, r"\[N, K\]"),
        ({"logits": torch.zeros(4, 0)}, "no classes"),
        ({"labels": torch.zeros(4)}, "labels must be int64"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"int64 \[4\]"),
        ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, "on meta"),
        ({"label_smoothing": 1.5}, "0..1"),
        ({"lam": torch.ones(4)}, "come together"),
        ({"lam": torch.ones(3), "labels_b": torch.zeros(4, dtype=torch.int64)}, "lam must be"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = {"logits": torch.zeros(4, 5), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{**inputs, **change})
