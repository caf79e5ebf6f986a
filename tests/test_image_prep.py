"""image_prep against float64 and against the CPU's own augmentation: equal random numbers and
parameters, pictures within rounding; its op contract and its bad inputs."""

import importlib
from dataclasses import astuple

import numpy as np
import pytest
import torch

from kernels.draws import COLOUR, CROP, TURN, draw, uniforms
from kernels.draws import reference as reference_parameters
from kernels.image_prep import GREY, SPEC, _op, forward, image_prep, reference
from kernels.launch import record, run, tl, triton
from tests.helpers import DEVICE, as_float64, assert_two_errors
from train.data import augment
from train.data.resident import KERNEL_AUGMENTS

pytestmark = pytest.mark.usefixtures("poisoned")

STRENGTHS = {
    kind: None if kind == "none" else astuple(augment.STRENGTHS[kind]) for kind in KERNEL_AUGMENTS
}
LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}  # so that the output is in 0..255
# a CPU picture is rounded to 8 bits after the affine map, which colours amplify by up to 1.3^3,
# and again after the colours
TOLERANCE = {"none": 0.51, "light": 0.52, "strong": 0.5 * 1.3**3 + 0.52}


@triton.jit
def _uniforms_kernel(index_ptr, u_ptr, seed, draw, epoch, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b, c, d = uniforms(seed, draw, tl.load(index_ptr + i).to(tl.uint32), epoch)
    tl.store(u_ptr + i, a)
    tl.store(u_ptr + BLOCK + i, b)
    tl.store(u_ptr + 2 * BLOCK + i, c)
    tl.store(u_ptr + 3 * BLOCK + i, d)


def pictures(n: int, store: int, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randint(256, (n, store, store, 3), generator=generator)
    return noise.to(torch.uint8).to(DEVICE)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 5, 2**63 - 1])
def test_random_numbers_are_the_cpus_bit_for_bit(seed):
    index = torch.tensor([0, 1, 2, 881, 2**31 - 1, 2**31, 2**32 - 1, 77], device=DEVICE)
    for number, epoch in ((0, 0), (1, 3), (2, 1000)):
        ours = torch.empty(4, 8, device=DEVICE)
        run(_uniforms_kernel, (1,), index, ours, seed, number, epoch, BLOCK=8)
        theirs = augment.uniform(seed, number, index.cpu().numpy(), epoch)
        assert np.array_equal(ours.cpu().numpy(), theirs)


def test_what_the_draws_mean_is_what_the_cpu_means():
    assert (CROP.value, TURN.value, COLOUR.value) == (augment.CROP, augment.TURN, augment.COLOUR)
    assert np.array_equal(GREY, augment._GREY)
    index, epoch, store, size = torch.arange(200, device=DEVICE), 5, 176, 128
    for strength in map(augment.STRENGTHS.get, KERNEL_AUGMENTS[1:]):
        where = (index.cpu().numpy(), epoch, 2024)
        theirs = np.concatenate(
            [
                augment._views(strength, *where, store, size).reshape(-1, 6),
                augment._colour_factors(strength, *where),
            ],
            axis=1,
        )
        args = (index, torch.tensor(epoch, device=DEVICE), 2024, astuple(strength), store, size)
        assert np.allclose(reference_parameters(*args).cpu(), theirs, rtol=0, atol=1e-11)
        # float32 positions in a picture of 176 pixels
        assert np.allclose(draw(*args).T.cpu(), theirs, rtol=0, atol=5e-5)


@pytest.mark.parametrize("store", [40, 32, 64], ids=["shrunk", "same", "half"])
@pytest.mark.parametrize("kind", KERNEL_AUGMENTS)
def test_pictures_are_the_cpus(kind, store, generator):
    images, index = pictures(5, store, generator), torch.tensor([4, 0, 2], device=DEVICE)
    ours = image_prep(
        images, index, 7, seed=99, size=32, strength=STRENGTHS[kind], dtype=torch.float32, **LEVELS
    )
    chosen = images[index].cpu().numpy()
    theirs = augment.augment_batch(chosen, index.cpu().numpy(), 7, 99, kind, 32)
    difference = ours.permute(0, 2, 3, 1).cpu() - torch.from_numpy(theirs).float()
    assert difference.abs().max() <= TOLERANCE[kind]
    assert difference.abs().mean() < 0.5


@pytest.mark.parametrize("kind", KERNEL_AUGMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_float64(kind, dtype, generator):
    for shape in ((1, 1, 1), (3, 13, 9), (2, 37, 37)):
        inputs = {**SPEC.make_inputs(shape, dtype, DEVICE, generator), "strength": STRENGTHS[kind]}
        truth = reference(**{**as_float64(inputs), "dtype": torch.float64})
        y = image_prep(**inputs)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        # positions are float32: 2e-5 pixels between neighbours that differ by 255 levels
        assert_two_errors(y, reference(**inputs), truth, f"{kind} {shape}", atol=1e-4)


def test_far_outside_is_reflected(generator):
    inputs = SPEC.make_inputs((4, 12, 12), torch.float32, DEVICE, generator)
    inputs["strength"] = (1.0, 1.0, 45.0, 0.0)
    truth = reference(**{**as_float64(inputs), "dtype": torch.float64})
    assert_two_errors(image_prep(**inputs), reference(**inputs), truth, atol=1e-4)


def test_view_depends_on_seed_epoch_and_number_alone(generator):
    images = pictures(6, 20, generator)
    options = {"size": 16, "strength": STRENGTHS["strong"], "dtype": torch.float32, **LEVELS}

    def view(index, epoch=3, seed=1, images=images, rows=None):
        index = torch.tensor(index, device=DEVICE)
        return image_prep(images, index, epoch, seed=seed, rows=rows, **options)

    whole = view([0, 5, 2, 5])
    assert torch.equal(whole[1], whole[3])
    assert torch.equal(whole[2:3], view([2]))
    assert torch.equal(whole, view([0, 5, 2, 5], epoch=torch.tensor(3, device=DEVICE)))
    assert not torch.equal(whole, view([0, 5, 2, 5], epoch=4))
    assert not torch.equal(whole, view([0, 5, 2, 5], seed=2))
    # a batch that was uploaded by itself: elsewhere in memory, drawn by its numbers
    apart = images[torch.tensor([5, 2], device=DEVICE)]
    assert torch.equal(whole[1:3], view([5, 2], images=apart, rows=torch.arange(2, device=DEVICE)))


def test_row_that_is_no_picture_is_never_silent(generator):
    inputs = SPEC.make_inputs((3, 8, 8), torch.float32, DEVICE, generator)
    for strength in STRENGTHS.values():
        for row in (-1, len(inputs["images"])):
            inputs["indices"][1] = row
            y = forward(**{**inputs, "strength": strength, "rows": None})
            assert y[1].isnan().all()
            assert y[0].isfinite().all()


def test_offsets_beyond_31_bits(generator, tmp_path):
    """The last of 11 million pictures starts at byte 2.1e9; only the pages that are touched
    exist."""
    store, count = 8, 2**31 // (3 * 8 * 8) + 3
    size = count * store * store * 3
    if DEVICE.type == "cuda":
        memory = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    else:
        memory = torch.from_file(str(tmp_path / "x"), shared=True, size=size, dtype=torch.uint8)
    images = memory.view(count, store, store, 3)
    near = images[-2:].copy_(pictures(2, store, generator)).clone()
    for strength in STRENGTHS.values():
        inputs = SPEC.make_inputs((2, store, 5), torch.float32, DEVICE, generator)
        inputs["strength"] = strength
        rows = torch.arange(2, device=DEVICE)
        expected = image_prep(**{**inputs, "images": near}, rows=rows)
        y = image_prep(**{**inputs, "images": images}, rows=rows + count - 2)
        assert torch.equal(y, expected)


def test_without_triton_it_is_the_reference(monkeypatch, generator):
    module = importlib.import_module("kernels.image_prep")
    monkeypatch.setattr(module, "runs_triton", lambda tensor: False)
    inputs = SPEC.make_inputs((2, 12, 9), torch.bfloat16, DEVICE, generator)
    y = image_prep(**inputs)
    assert torch.equal(y, reference(**inputs))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_empty_batch(generator):
    inputs = SPEC.make_inputs((0, 12, 9), torch.bfloat16, DEVICE, generator)
    assert image_prep(**inputs).shape == (0, 3, 9, 9)


def test_opcheck(generator):
    inputs = SPEC.make_inputs((2, 12, 9), torch.float32, DEVICE, generator)
    for strength in (None, list(STRENGTHS["strong"])):
        arguments = {**inputs, "strength": strength, "rows": None}
        arguments.update({name: list(inputs[name]) for name in ("mean", "std")})
        torch.library.opcheck(_op, (), arguments)


def test_torch_compile_goes_through(generator):
    inputs = SPEC.make_inputs((2, 12, 9), torch.float32, DEVICE, generator)
    compiled = torch.compile(
        lambda **inputs: 2 * image_prep(**inputs), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(**inputs), 2 * image_prep(**inputs))


def test_launches():
    for kind, names in (
        ("none", ["_prep_kernel"]),
        ("light", ["_draw_kernel", "_prep_kernel"]),
        ("strong", ["_draw_kernel", "_mean_kernel", "_prep_kernel"]),
    ):
        inputs = SPEC.make_inputs((2, 12, 9), torch.float32, DEVICE, torch.Generator())
        with record() as recording:
            forward(**{**inputs, "strength": STRENGTHS[kind], "rows": None})
        assert [launch.kernel.__name__ for launch in recording.launches] == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 8, 9, 3, dtype=torch.uint8)}, r"\[N, S, S, 3\]"),
        ({"images": torch.zeros(4, 8, 8, 3)}, "contiguous uint8"),
        ({"indices": torch.zeros(2, dtype=torch.int32)}, "indices must be int64"),
        ({"indices": torch.zeros(2, dtype=torch.int64, device="meta")}, "on meta"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, "rows must be int64"),
        ({"epoch": torch.zeros(1)}, "epoch must be int64"),
        ({"size": 9}, "size must lie in"),
        ({"dtype": torch.int8}, "float type"),
        ({"strength": (0.5, 1.0, 60.0, 0.0)}, "degrees in"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = SPEC.make_inputs((2, 8, 8), torch.float32, torch.device("cpu"), torch.Generator())
    with pytest.raises(ValueError, match=message):
        image_prep(**{**inputs, **change})
