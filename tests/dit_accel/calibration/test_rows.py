"""Rows of stretches: own ones in the first half of a run, one for the second."""

import pytest

from dit_accel.calibration.rows import stretch_rows


def test_ten_stretches_have_six_rows():
    assert stretch_rows(50, 10) == (0, 1, 2, 3, 4, 5, 5, 5, 5, 5)
    assert stretch_rows(10, 10) == (0, 1, 2, 3, 4, 5, 5, 5, 5, 5)
    assert stretch_rows(50, 1) == (0,)


@pytest.mark.parametrize("stretches", [1, 2, 3, 7, 10, 64])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 28, 50])
def test_every_row_has_a_step(steps, stretches):
    rows = stretch_rows(steps, stretches)
    taken = [rows[step * stretches // steps] for step in range(steps)]
    assert taken == sorted(taken)
    assert set(taken) == set(range(max(rows) + 1))
    assert len(rows) == stretches
