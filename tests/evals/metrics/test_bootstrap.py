"""Bootstrap intervals of means."""

import numpy as np
import pytest

from dit_accel.evals.metrics.bootstrap import mean_interval, resamples


def test_the_interval_is_that_of_the_normal_distribution_for_many_values():
    values = np.random.default_rng(1).standard_normal(400)
    low, high = mean_interval(values)
    deviation = values.std() / 20
    assert (low, high) == pytest.approx(
        (values.mean() - 1.96 * deviation, values.mean() + 1.96 * deviation), abs=0.01
    )
    assert mean_interval(values) == (low, high)
    assert mean_interval(np.full(5, 2.5)) == (2.5, 2.5)


def test_draws_are_uniform_and_with_replacement():
    picks = np.stack(list(resamples(4, 3000)))
    assert picks.shape == (3000, 4)
    assert np.bincount(picks.ravel()) / picks.size == pytest.approx([0.25] * 4, abs=0.02)
    assert any(len(set(row)) < 4 for row in picks)
