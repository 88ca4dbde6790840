"""`block_mask(...).to_token_mask()` equals `token_mask()`: any pattern, layout, order and block size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel import TokenLayout
from dit_accel.patterns import (
    Clear,
    Dense,
    InwardWindow,
    LocalGlobal,
    Neighborhood,
    Radial,
    ShiftedWindow,
    SlidingTile,
)


@st.composite
def layouts(draw):
    grid = (draw(st.sampled_from([1, 1, 2, 5])), draw(st.integers(1, 12)), draw(st.integers(1, 14)))
    anchor = draw(st.sampled_from([None, None, (1, 2, 2)]))
    return TokenLayout(grid, draw(st.sampled_from([0, 7, 40])), draw(st.booleans()), anchor)


@st.composite
def neighborhoods(draw, layout):
    axes = draw(st.integers(1, 3))
    parameters = []
    for length in layout.grid[3 - axes :]:
        window = draw(st.integers(min(2, length), length))
        dilation = draw(st.integers(1, max(1, length // window)))
        parameters.append((window, draw(st.integers(1, window)), dilation, draw(st.booleans())))
    return Neighborhood(*(tuple(values) for values in zip(*parameters, strict=True)))


@st.composite
def cases(draw):
    layout = draw(layouts())
    side, flag = st.integers(1, 4), st.booleans()
    pattern = draw(
        st.one_of(
            st.just(Dense()),
            st.builds(Clear, radius=st.floats(0.5, 7)),
            st.builds(Radial, st.sampled_from([0.2, 0.95]), st.sampled_from([16, 128]), flag, flag),
            st.builds(SlidingTile, window=st.tuples(side, side, side), tile=st.tuples(side, side, side)),
            st.builds(InwardWindow, st.tuples(side, side)),
            st.builds(ShiftedWindow, st.tuples(side, side), st.tuples(side, side) | st.integers(0, 3)),
            st.builds(LocalGlobal, st.tuples(side, side), st.tuples(side, side), flag),
            neighborhoods(layout),
        )
    )  # fmt: skip
    return pattern, layout


@given(
    cases(),
    st.sampled_from(["auto", "raster", "tile", "hilbert", "random"]),
    st.sampled_from([(16, 8), (32, 16), (64, 16), (128, 64), (64, 128)]),
)
@settings(max_examples=150, deadline=None)
def test_block_mask_is_exact(case, order, block_size):
    pattern, layout = case
    if order == "random":
        order = torch.randperm(layout.visual_len, generator=torch.Generator().manual_seed(layout.seq_len))
    exact = pattern.token_mask(layout)
    mask = pattern.block_mask(layout, block_size, order)
    assert torch.equal(mask.to_token_mask(), exact)
    assert mask.density == pytest.approx(exact.double().mean().item(), abs=1e-12)
    assert pattern.density(layout) == pytest.approx(mask.density, abs=1e-12)


@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        (Clear(16), TokenLayout((1, 64, 128), 40, text_first=True)),
        (Neighborhood((4, 12, 12)), TokenLayout((8, 32, 32))),
        (Radial(0.2, first_frame_sink=True), TokenLayout((8, 32, 32))),
        (SlidingTile((3, 3, 3), (2, 8, 8)), TokenLayout((10, 44, 40))),
    ],
    ids=["clear", "neighborhood", "radial", "sliding_tile"],
)
def test_auto_order_is_the_cheapest(pattern, layout):
    density = {
        order: pattern.block_mask(layout, order=order).block_density
        for order in ("raster", "tile", "hilbert")
    }
    assert pattern.block_mask(layout).block_density <= 1.02 * min(density.values())


def test_tile_order_pays_for_discs():
    layout = TokenLayout((1, 64, 128), 512, text_first=True)
    blocks = {
        order: Clear(8).block_mask(layout, (128, 128), order).block_density for order in ("auto", "raster")
    }
    assert blocks["raster"] > 1.4 * blocks["auto"]


@pytest.mark.slow
def test_a_long_video_builds_without_a_square():
    """118,800 tokens: the dense mask would have 14 billion entries."""
    layout = TokenLayout((33, 45, 80))
    for pattern in (Neighborhood((12, 24, 24)), Radial()):
        mask = pattern.block_mask(layout)
        assert mask.density == pytest.approx(pattern.density(layout), rel=1e-12)


def test_unknown_orders_are_refused():
    layout = TokenLayout((1, 4, 4))
    with pytest.raises(
        ValueError, match="`order` must be 'auto', 'raster', 'tile', 'hilbert' or a permutation"
    ):
        Clear(2).block_mask(layout, order="zigzag")
    with pytest.raises(ValueError, match="`order` must be a permutation of the 16 visual tokens"):
        Clear(2).block_mask(layout, order=[0, 1, 2])
