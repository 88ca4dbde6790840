"""Estimated block densities: exact where every query block is counted, close where a part is."""

from __future__ import annotations

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.masks.estimate import estimate_mask
from dit_accel.patterns import Clear, Dense, LocalGlobal, Neighborhood, Radial, ShiftedWindow, SlidingTile
from dit_accel.runtime.geometry import visual_permutation

CASES = {
    "clear-text-first": (Clear(4.5), TokenLayout((1, 20, 27), text_len=37, text_first=True)),
    "neighborhood-no-text": (Neighborhood((3, 5, 5)), TokenLayout((4, 9, 11))),
    "radial-ragged": (Radial(0.2, block_size=32, first_frame_sink=True), TokenLayout((5, 9, 7))),
    "exact-radial": (Radial(0.2, block_size=16, exact=True), TokenLayout((6, 8, 8), text_len=9)),
    "tiles": (SlidingTile((1, 3, 1), (2, 2, 4)), TokenLayout((4, 8, 8), text_len=130)),
    "shifted": (ShiftedWindow((4, 4)), TokenLayout((1, 16, 16), text_len=7)),
    "anchor-unseeing": (LocalGlobal((4, 4)), TokenLayout((1, 16, 20), text_len=5, anchor=(1, 8, 10))),
    "anchor-without-text": (LocalGlobal((4, 4)), TokenLayout((1, 16, 20), anchor=(1, 8, 10))),
    "dense": (Dense(), TokenLayout((2, 5, 7), text_len=3)),
    "shorter-than-a-block": (Clear(2), TokenLayout((1, 3, 3), text_len=2)),
}


@pytest.mark.parametrize("order", ["auto", "raster", "tile", "hilbert"])
@pytest.mark.parametrize("blocks", [(128, 64), (64, 16), (32, 24)], ids=str)
@pytest.mark.parametrize(("pattern", "layout"), CASES.values(), ids=CASES)
def test_all_query_blocks_give_what_the_mask_has(pattern, layout, blocks, order):
    mask = pattern.block_mask(layout, blocks, order)
    found = estimate_mask(pattern, layout, blocks, order)
    assert (found.sampled, found.rows) == (mask.num_rows, mask.num_rows)
    assert found.block_density == pytest.approx(mask.block_density, rel=1e-12)
    assert found.density == pytest.approx(mask.density, rel=1e-12)
    assert torch.equal(found.order, visual_permutation(mask, layout))


@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        (Clear(6), TokenLayout((1, 80, 96), text_len=100, text_first=True)),
        (Neighborhood((3, 5, 9)), TokenLayout((8, 24, 40))),
        (Radial(0.2, first_frame_sink=True), TokenLayout((9, 30, 26))),
    ],
    ids=["clear", "neighborhood", "radial"],
)
def test_a_part_of_them_comes_close_and_the_same_in_every_call(pattern, layout):
    mask = pattern.block_mask(layout, (32, 16))
    found, again = (estimate_mask(pattern, layout, (32, 16), sampled=64) for _ in range(2))
    assert 64 <= found.sampled < found.rows == mask.num_rows
    assert found.block_density == again.block_density
    assert found.block_density == pytest.approx(mask.block_density, rel=0.03)


def test_an_order_may_be_given():
    layout = TokenLayout((1, 12, 16), text_len=5)
    order = torch.randperm(layout.visual_len, generator=torch.Generator().manual_seed(0))
    mask = Clear(3).block_mask(layout, (32, 16), order)
    assert estimate_mask(Clear(3), layout, (32, 16), order).block_density == mask.block_density


def test_what_masks_refuse_is_refused():
    layout = TokenLayout((1, 12, 16))
    with pytest.raises(ValueError, match="`order` must be"):
        estimate_mask(Clear(3), layout, (32, 16), "zigzag")
    with pytest.raises(ValueError, match="`block_size` must be"):
        estimate_mask(Clear(3), layout, (33, 16))
    with pytest.raises(ValueError, match="window"):
        estimate_mask(Neighborhood((13, 5)), layout, (32, 16))
