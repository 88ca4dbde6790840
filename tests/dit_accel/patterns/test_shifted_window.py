import random

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import ShiftedWindow


def test_rolling_windowing_and_rolling_back():
    """The definition: roll by -shift, cut into windows, roll back by +shift."""
    layout, shift = TokenLayout((1, 7, 10)), (1, 2)
    window = torch.arange(7)[:, None] // 4 * 2 + torch.arange(10) // 5
    ids = torch.roll(window, shift, (0, 1)).flatten()
    assert torch.equal(ShiftedWindow((2, 2), shift).token_mask(layout), ids[:, None] == ids)


def test_odd_sizes_keep_a_shorter_last_window():
    layout = TokenLayout((1, 7, 8))
    for pattern in (ShiftedWindow(), *ShiftedWindow().variants):
        assert pattern.density(layout) == (4**2 + 3**2) / 7**2 * 0.5


def test_a_number_is_quarters_of_a_window():
    layout = TokenLayout((2, 17, 24))  # windows of 9 x 12: quarters of 2 and 3 tokens
    for quarters in range(4):
        expected = ShiftedWindow(shift=(2 * quarters, 3 * quarters)).token_mask(layout)
        assert torch.equal(ShiftedWindow(shift=quarters).token_mask(layout), expected)


def test_the_shift_of_a_step_is_drawn_from_the_seed():
    state = (random.getstate(), torch.random.get_rng_state())
    drawn = {seed: [ShiftedWindow(seed=seed).at_step(step).shift for step in range(200)] for seed in (0, 1)}
    assert random.getstate() == state[0]
    assert torch.equal(torch.random.get_rng_state(), state[1])
    assert drawn[0] != drawn[1]
    assert drawn[0] == [ShiftedWindow().at_step(step).shift for step in range(200)]
    assert all(30 < drawn[0].count(quarters) < 70 for quarters in range(4))
    assert ShiftedWindow().at_step(3) in ShiftedWindow().variants
    assert ShiftedWindow(shift=(1, 2)).at_step(3) == ShiftedWindow(shift=(1, 2))


@pytest.mark.parametrize("grid", [(1, 24, 24), (1, 48, 48), (1, 64, 96), (5, 34, 30), (17, 22, 22)])
def test_the_order_is_the_cheapest_for_all_shifts_together(grid):
    layout, size, moving = TokenLayout(grid), (64, 16), ShiftedWindow()

    def blocks(order):
        return sum(variant.block_mask(layout, size, order).block_density for variant in moving.variants)

    order = moving.block_mask(layout, size).order
    order = torch.arange(layout.visual_len) if order is None else order
    others = [moving.block_mask(layout, size, name).order for name in ("tile", "hilbert")]
    others += moving.natural_orders(layout)
    assert blocks(order) <= 1.02 * min(blocks(other) for other in others)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("windows", (0, 2), "must be 2 integers"),
        ("windows", (2,), "must be 2 integers"),
        ("windows", 2, "must be 2 integers"),
        ("shift", (1, 0.5), "must be 2 integers"),
        ("shift", "each", "must be 'step', a number of quarters"),
        ("shift", 0.5, "must be 'step', a number of quarters"),
        ("seed", None, "must be an integer"),
    ],
)
def test_bad_arguments(name, value, message):
    with pytest.raises(ValueError, match=f"`{name}` {message}"):
        ShiftedWindow(**{name: value})
