"""`block_mask(...).to_token_mask()` equals `token_mask()`: any pattern, layout, order and block size."""

from dataclasses import replace

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


@st.composite
def parts(draw, keys):
    """Queries that are a part of the keys' grid, with text and an anchor of their own."""
    offset = tuple(draw(st.integers(0, n - 1)) for n in keys.grid)
    grid = tuple(draw(st.integers(1, n - at)) for n, at in zip(keys.grid, offset, strict=True))
    return replace(draw(layouts()), grid=grid, offset=offset)


class PooledClear(Clear):
    """Visual tokens see some extra keys as well."""

    def pooled_keys(self, layout):
        return layout.visual_len // 4


@given(
    st.data(),
    cases(),
    st.sampled_from(["auto", "raster", "tile", "hilbert", "random"]),
    st.sampled_from([(16, 8), (32, 16), (64, 16), (64, 128)]),
    st.sampled_from(["last", "model"]),
)
@settings(max_examples=150, deadline=None)
def test_queries_may_be_a_part_of_the_keys(data, case, order, block_size, text):
    pattern, keys = case
    if data.draw(st.booleans()):
        pattern = PooledClear(2)
    queries = data.draw(st.just(keys) | parts(keys))
    key_order = None
    if order == "random":
        generator = torch.Generator().manual_seed(keys.seq_len)
        order, key_order = (torch.randperm(n.visual_len, generator=generator) for n in (queries, keys))
    exact = pattern.token_mask(queries, keys)
    mask = pattern.block_mask(queries, block_size, order, keys=keys, key_order=key_order, text=text)
    assert torch.equal(mask.to_token_mask(), exact)
    assert exact.shape == (queries.seq_len, keys.seq_len + pattern.pooled_keys(keys))
    assert pattern.density(queries, keys) == pytest.approx(exact.double().mean().item(), abs=1e-12)
    first = 0 if keys.text_first and text == "model" else keys.visual_len + keys.anchor_len
    assert mask.text == (first, first + keys.text_len)
    mask._validated()


def test_a_chunk_of_frames_has_the_rows_of_the_whole():
    keys = TokenLayout((6, 5, 7), text_len=9)
    chunk = TokenLayout((2, 5, 7), offset=(3, 0, 0))
    for pattern in (Radial(0.5, 16), Neighborhood((3, 3, 3)), Clear(2)):
        whole = pattern.block_mask(keys, (32, 16)).to_token_mask()
        part = pattern.block_mask(chunk, (32, 16), keys=keys).to_token_mask()
        assert torch.equal(part, whole[3 * 35 : 5 * 35])


def test_text_in_the_models_place_moves_nothing():
    layout = TokenLayout((1, 8, 8), text_len=20, text_first=True)
    mask = Clear(3).block_mask(layout, (32, 16), "raster", text="model")
    assert mask.order is None
    assert mask.key_order is None
    assert mask.text == (0, 20)
    assert Clear(3).block_mask(layout, (32, 16), "raster").order is not None


@pytest.mark.parametrize(
    ("queries", "options", "message"),
    [
        ({"grid": (2, 4, 4), "offset": (3, 0, 0)}, {}, "at offset .* reach out of the keys' grid"),
        ({"grid": (1, 4, 5)}, {}, r"queries on grid \(1, 4, 5\) .* reach out of the keys' grid \(4, 4, 4\)"),
        ({"grid": (1, 4, 4)}, {"order": list(range(16))}, "needs a `key_order`"),
        ({"grid": (1, 4, 4)}, {"key_order": list(range(16))}, "`key_order` must be a permutation of the 64"),
        ({"grid": (1, 4, 4)}, {"text": "first"}, "`text` must be 'last' or 'model', got 'first'"),
    ],
)
def test_queries_and_keys_that_do_not_fit(queries, options, message):
    with pytest.raises(ValueError, match=message):
        Clear(2).block_mask(TokenLayout(**queries), keys=TokenLayout((4, 4, 4)), **options)


def test_keys_are_a_whole():
    keys = TokenLayout((2, 4, 4), offset=(1, 0, 0))
    with pytest.raises(ValueError, match=r"the layout of the keys must have no `offset`, got \(1, 0, 0\)"):
        Clear(2).block_mask(TokenLayout((1, 4, 4)), keys=keys)


@pytest.mark.parametrize("offset", [(0, -1, 0), (0, 1), (0, 1, 0.5), (0, True, 0)])
def test_offsets_that_are_none(offset):
    with pytest.raises(ValueError, match="`offset` must be three integers of at least 0"):
        TokenLayout((1, 4, 4), offset=offset)


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


@pytest.mark.parametrize(
    "order",
    [
        [0, 1, 2],
        [*range(15), 2**70],
        [*range(15), -(2**63)],
        [float(n) for n in range(16)],
        [n * 1j for n in range(16)],
        [list(range(16))],
        ["0"] * 16,
        [[0, 1], [2]],
        None,
        3,
        object(),
    ],
    ids=lambda order: repr(order)[:12],
)
def test_what_is_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match="`order` must be a permutation of the 16 visual tokens"):
        Clear(2).block_mask(TokenLayout((1, 4, 4)), order=order)
