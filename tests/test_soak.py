"""What `python -m tests.soak` calls growth."""

import numpy as np
import pytest

from tests.soak import slope


def test_noise_is_no_growth_and_a_leak_is():
    rng = np.random.default_rng(0)
    seconds = np.arange(0, 1800, 9.0)
    noise = 600 + rng.normal(0, 5, len(seconds))
    warm = 100 * np.exp(-seconds / 60)  # pools that fill at first are no growth either
    flat = slope(seconds, noise - warm)
    assert flat["low"] < 0 < flat["high"]
    leak = slope(seconds, noise + 40 * seconds / 3600)
    assert 0 < leak["low"] < 40 < leak["high"]


def test_a_soak_of_few_rounds_says_so():
    with pytest.raises(SystemExit, match="too few"):
        slope(range(11), [1.0] * 11)
