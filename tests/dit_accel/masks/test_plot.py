"""Pictures of masks: their grey levels are the shares attended, in both orders."""

from __future__ import annotations

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.masks.plot import CAPTION, MARGIN, PANEL, draw, rows_of, shares
from dit_accel.patterns import Clear, Neighborhood, SparseVideoGen

NEAR = Neighborhood((3, 5))


@pytest.mark.parametrize("order", ["raster", "tile"])
def test_shares_of_a_small_mask_are_its_elements(order):
    layout = TokenLayout((2, 6, 8), text_len=5, text_first=True)
    mask = NEAR.block_mask(layout, (32, 16), order)
    assert torch.equal(shares(mask), mask.to_kernel_mask()[0].float())
    places = torch.arange(layout.seq_len) if mask.order is None else mask.order
    assert torch.equal(shares(mask, places, places), NEAR.token_mask(layout).float())


def test_queries_that_are_a_part_of_the_keys():
    keys, queries = TokenLayout((4, 5, 6), text_len=7), TokenLayout((1, 5, 6), offset=(2, 0, 0))
    mask = NEAR.block_mask(queries, (32, 16), "hilbert", keys=keys)
    assert torch.equal(shares(mask, mask.order, mask.key_order), NEAR.token_mask(queries, keys).float())
    assert draw(mask).size == draw(NEAR.block_mask(keys, (32, 16))).size


def test_rows_are_the_masks():
    layout = TokenLayout((1, 20, 30), text_len=7)
    mask = Clear(4).block_mask(layout, (64, 16), "tile")
    chosen = torch.tensor([0, 63, 64, 599, 606])
    assert torch.equal(rows_of(mask, chosen), mask.to_kernel_mask()[0, chosen])


def test_shares_of_a_large_mask_average_to_its_density():
    layout = TokenLayout((1, 32, 64))
    mask = Clear(9).block_mask(layout, (64, 16), "tile")
    for order in (None, mask.order):
        found = shares(mask, order, order)
        assert found.shape == (PANEL, PANEL)
        assert float(found.mean()) == pytest.approx(mask.density, rel=1e-4)


def test_has_two_panels_that_are_dark_where_attended():
    image = draw(NEAR.block_mask(TokenLayout((3, 6, 8)), (64, 16)), "near")
    assert image.size == (2 * PANEL + 3 * MARGIN, PANEL + CAPTION + 2 * MARGIN)
    assert image.mode == "L"
    pixel = image.getpixel((2 * MARGIN + PANEL + 1, MARGIN + CAPTION + 1))
    assert pixel == 0  # the first token attends to itself


def test_of_heads_that_choose():
    pattern, layout = SparseVideoGen(keep=0.5, block_size=16), TokenLayout((3, 6, 8))
    masks = LayerMasks(layout, "raster", (64, 16), torch.device("cpu"))
    attention = layer_attention([pattern] * 2, masks)
    image = draw(attention.mask, orders=attention.model_orders())
    panel = image.crop((2 * MARGIN + PANEL, MARGIN + CAPTION, 2 * (MARGIN + PANEL), MARGIN + CAPTION + PANEL))
    assert {0, 128} <= set(panel.getdata())  # by both kinds of head, by one
