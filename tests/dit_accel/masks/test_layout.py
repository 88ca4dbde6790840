import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel import TokenLayout
from dit_accel.masks.layout import MOST_TOKENS


def test_slices_follow_the_families():
    flux = TokenLayout((1, 4, 6), text_len=5, text_first=True)
    assert (flux.text_slice, flux.visual_slice, flux.seq_len) == (slice(0, 5), slice(5, 29), 29)
    hunyuan = TokenLayout((3, 4, 6), text_len=5)
    assert (hunyuan.visual_slice, hunyuan.text_slice, hunyuan.visual_len) == (slice(0, 72), slice(72, 77), 72)
    scale_dit = TokenLayout((1, 4, 4), text_len=3, text_first=True, anchor=(1, 2, 2))
    assert (scale_dit.anchor_slice, scale_dit.seq_len) == (slice(19, 23), 23)


def test_coordinates_are_row_major():
    layout = TokenLayout((2, 3, 4))
    f, h, w = layout.coordinates.unbind(1)
    assert torch.equal((f * 3 + h) * 4 + w, torch.arange(24, dtype=torch.int32))


@pytest.mark.parametrize(
    "arguments",
    [
        {"grid": (0, 4, 4)},
        {"grid": (4, 4)},
        {"grid": (True, 4, 4)},
        {"grid": (1, 4.0, 4)},
        {"grid": (1, 4, 4), "text_len": -1},
        {"grid": (1, 4, 4), "text_len": True},
    ],
)
def test_impossible_geometry_is_refused(arguments):
    with pytest.raises(ValueError, match=r"`(grid|text_len)` must be"):
        TokenLayout(**arguments)


@given(
    st.tuples(*[st.sampled_from([1, 5, 46_341, 2**31, 2**63, 2**70]) | st.integers(1, 2**70)] * 3),
    st.sampled_from([0, 7, 2**31, 2**70]),
)
def test_more_tokens_than_the_limit_are_refused(grid, text_len):
    tokens = math.prod(grid) + text_len
    if tokens <= MOST_TOKENS:
        assert TokenLayout(grid, text_len).seq_len == tokens
    else:
        with pytest.raises(ValueError, match=f"must be at most 4194304 tokens, got {tokens}"):
            TokenLayout(grid, text_len)


@pytest.mark.parametrize(
    "beyond",
    [
        {"grid": (1, 2048, 2049)},
        {"grid": (2**40, 2**40, 2**40)},
        {"grid": (1, 2048, 2048), "text_len": 1},
        {"grid": (1, 2048, 2047), "anchor": (1, 64, 64)},
        {"grid": (1, 1, 1), "text_len": 10**30},
    ],
    ids=["grid", "absurd-grid", "text", "anchor", "absurd-text"],
)
def test_tokens_beyond_the_limit_are_refused(beyond):
    with pytest.raises(
        ValueError, match=r"must be at most 4194304 tokens, got \d+: .* smaller size or fewer frames"
    ):
        TokenLayout(**beyond)


@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout((1, 2048, 2048)),  # the limit
        TokenLayout((1, 1024, 1024), text_len=512),  # FLUX, 16384 x 16384
        TokenLayout((1, 270, 480), text_len=512),  # FLUX, 8K
        TokenLayout((241, 45, 80)),  # Wan, a minute at 1280 x 720
    ],
    ids=lambda layout: str(layout.grid).replace(" ", ""),
)
def test_real_sizes_are_below_it(layout):
    assert layout.seq_len <= MOST_TOKENS


def test_equal_layouts_are_one_cache_key():
    assert len({TokenLayout((1, 4, 4)), TokenLayout([1, 4, 4])}) == 1
