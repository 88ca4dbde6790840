"""Pictures of masks that were not built, against masks that were."""

import numpy as np
import pytest
import torch

from dit_accel import TokenLayout, patterns
from dit_accel.masks.block_picture import block_kinds, draw_blocks, draw_neighbourhood, neighbourhood

LAYOUTS = [
    TokenLayout((1, 13, 11)),
    TokenLayout((1, 16, 16), text_len=9, text_first=True),
    TokenLayout((5, 8, 9), text_len=3),
]
PATTERNS = [
    patterns.Clear(3),
    patterns.Radial(decay_factor=0.5, block_size=32),
    patterns.SpatialHead(keep=0.6, block_size=16),
    patterns.Dense(),
]
CASES = [
    (pattern, layout)
    for pattern in PATTERNS
    for layout in LAYOUTS
    if layout.grid[0] > 1 or isinstance(pattern, patterns.Clear | patterns.Dense)
    if not (layout.grid[0] > 1 and isinstance(pattern, patterns.Clear))
]


@pytest.mark.parametrize("order", ["raster", "tile", "auto"])
@pytest.mark.parametrize(("pattern", "layout"), CASES, ids=str)
def test_blocks_are_those_of_the_exact_mask(pattern, layout, order):
    size = (32, 16)
    tokens = pattern.token_order(layout, size, order)
    exact = pattern.token_mask(layout)[layout.visual_slice, layout.visual_slice][tokens][:, tokens]
    kinds = block_kinds(pattern, layout, size, tokens)
    rows, columns = kinds.shape
    assert (rows, columns) == (-(-layout.visual_len // 32), -(-layout.visual_len // 16))
    for r in range(rows):
        for c in range(columns):
            block = exact[r * 32 : (r + 1) * 32, c * 16 : (c + 1) * 16]
            assert (kinds[r, c] > 0) == bool(block.any())
            if kinds[r, c] == 2:
                assert block.all()


@pytest.mark.parametrize(("pattern", "layout"), CASES, ids=str)
def test_a_neighbourhood_is_a_row_of_the_exact_mask(pattern, layout):
    exact = pattern.token_mask(layout)[layout.visual_slice, layout.visual_slice]
    for query in (0, 37, layout.visual_len - 1):
        found = neighbourhood(pattern, layout, query)
        assert np.array_equal(found.ravel(), exact[query].numpy())


def test_the_query_is_a_red_dot_and_in_the_middle_by_default():
    picture = np.asarray(draw_neighbourhood(patterns.Clear(3), TokenLayout((1, 15, 21)), pixels=21))
    red = np.argwhere((picture == (220, 38, 38)).all(-1))
    assert red.tolist() == [[y, x] for y in range(5, 10) for x in range(8, 13)]  # around (7, 10)


def test_what_is_no_visual_token_is_refused():
    with pytest.raises(ValueError, match="from 0 to 63"):
        neighbourhood(patterns.Clear(3), TokenLayout((1, 8, 8), text_len=5), 64)


def test_a_long_sequence_is_drawn_small():
    layout = TokenLayout((21, 45, 80), text_len=100)
    pattern = patterns.Neighborhood((3, 9, 9))
    picture = draw_blocks(pattern, layout, (128, 64), torch.arange(layout.visual_len), pixels=400)
    assert picture.size == (400, 400)
