"""bn_act_pool against float64 and PyTorch's own max-pool: ties, NaN, frozen statistics, gradients."""

import pytest
import torch
import torch.nn.functional as F

from kernels import stem_pool
from kernels.activation import ACTS, REFERENCE
from kernels.launch import record
from kernels.shapes import EDGES
from kernels.stem_pool import SPEC, _op, bn_act_pool, forward, reference
from tests.helpers import DEVICE, assert_two_errors, check_against_float64

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(training, act, dtype, generator):
    for shape in EDGES[training:]:  # one value a channel has no variance
        inputs = SPEC.make_inputs(shape, dtype, DEVICE, generator)
        check(inputs, generator, act=act, training=training)


def check(inputs, generator, atol=1e-6, **options):
    """The two-error rule where no two candidates of a window are so close that rounding decides."""
    check_against_float64(bn_act_pool, reference, {**inputs, **options}, generator, atol)
