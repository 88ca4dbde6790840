import pytest
import torch

from dit_accel import TokenLayout, attention
from dit_accel.patterns import ByNoise, Clear, Dense, Neighborhood, ShiftedWindow, SparseVideoGen

NEAR, FAR = Clear(2), Clear(5)
PATTERN = ByNoise({0.5: FAR, 0: NEAR, 0.9: Dense()})
LAYOUT = TokenLayout((1, 8, 12), text_len=5)


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [(1, Dense()), (0.9, Dense()), (0.8999, FAR), (0.5, FAR), (0.4999, NEAR), (0.0, NEAR)],
)
def test_a_level_is_where_its_pattern_begins(sigma, expected):
    assert PATTERN.at_step(3, sigma) == expected
    assert PATTERN.levels == ((0.9, Dense()), (0.5, FAR), (0.0, NEAR))


def test_patterns_within_follow_the_step_as_well():
    moving = ShiftedWindow()
    pattern = ByNoise([(0.5, moving), (0, Dense())])
    assert [pattern.at_step(step, 0.7) for step in range(9)] == [moving.at_step(step) for step in range(9)]
    assert set(pattern.variants) == {*moving.variants, Dense()}


def test_without_a_noise_level():
    with pytest.raises(ValueError, match="ByNoise needs the noise level of the step; give `sigma`"):
        PATTERN.at_step(0)


@pytest.mark.parametrize("order", ["auto", "raster", "tile", "hilbert"])
def test_outside_of_a_run_it_is_that_of_the_weakest_noise(order):
    assert torch.equal(PATTERN.token_mask(LAYOUT), NEAR.token_mask(LAYOUT))
    assert PATTERN.density(LAYOUT) == NEAR.density(LAYOUT)
    mask = PATTERN.block_mask(LAYOUT, (32, 16), order)
    assert torch.equal(mask.to_token_mask().squeeze(), NEAR.token_mask(LAYOUT))


def test_one_order_suits_all_static_patterns():
    layout, size = TokenLayout((4, 16, 16)), (32, 16)
    pattern = ByNoise({0.5: Neighborhood((4, 3, 3)), 0.2: SparseVideoGen(0.5), 0: Neighborhood((2, 16, 16))})
    order = pattern.token_order(layout, size)

    def blocks(order):
        static = (one for one in pattern.variants if not one.online)
        return sum(one.block_mask(layout, size, order).block_density for one in static)

    alone = [one.token_order(layout, size) for one in pattern.variants if not one.online]
    assert blocks(order) <= 1.02 * min(map(blocks, [torch.arange(layout.visual_len), *alone]))


@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.1])
def test_attention(sigma):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, LAYOUT.seq_len, 16, generator=generator)
    found = attention(q, k, v, PATTERN, LAYOUT, sigma=sigma)
    mask = PATTERN.at_step(0, sigma).token_mask(LAYOUT)
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="give `sigma`"):
        attention(q, k, v, PATTERN, LAYOUT)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ({}, "must be pairs"),
        ([0.5, Dense()], "must be pairs"),
        ("dense", "must be pairs"),
        ({0.5: Dense()}, r"of which the lowest is 0, got \[0\.5\]"),
        ([(0, Dense()), (0.0, NEAR)], "must be different ones"),
        ({1.5: Dense(), 0: NEAR}, "noise level from 0 to 1, got 1.5"),
        ({"0.5": Dense(), 0: NEAR}, "noise level from 0 to 1, got '0.5'"),
        ({0: "Dense"}, "must hold patterns"),
        ({0: PATTERN}, "must hold patterns that are not by noise"),
    ],
    ids=str,
)
def test_bad_levels(levels, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ByNoise(levels)
