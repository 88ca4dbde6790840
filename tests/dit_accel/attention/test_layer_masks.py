"""The masks of a layer: built once, with text where it is cheaper."""

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.patterns import Clear, Dense, Neighborhood

CPU = torch.device("cpu")


def masks_of(layout: TokenLayout, **options) -> LayerMasks:
    return LayerMasks(layout, "auto", (64, 16), CPU, **options)


@pytest.mark.parametrize("text_len", [64, 128])
def test_text_that_fills_blocks_stays_where_the_model_has_it(text_len):
    masks = masks_of(TokenLayout((1, 16, 16), text_len, text_first=True))
    assert masks.of(Clear(3)).text == (0, text_len)
    assert masks.text == "model"
    last = masks_of(masks.layout, text="last").of(Clear(3))
    assert masks.of(Clear(3)).block_density == pytest.approx(last.block_density, rel=0.02)


@pytest.mark.parametrize("text_len", [7, 24, 65])
@pytest.mark.parametrize("pattern", [Clear(3), Neighborhood((5, 5)), Dense()], ids=str)
def test_other_text_stands_where_fewer_keys_are_paid_for(text_len, pattern):
    masks = masks_of(TokenLayout((1, 24, 24), text_len, text_first=True))
    by_place = {text: masks_of(masks.layout, text=text).of(pattern) for text in ("model", "last")}
    masks.of(pattern)
    paid = {text: mask.block_density * mask.seq_len for text, mask in by_place.items()}
    assert paid[masks.text] <= min(paid.values()) + 9


@pytest.mark.parametrize("layout", [TokenLayout((1, 8, 12), 7), TokenLayout((2, 8, 6), text_first=True)])
def test_text_that_comes_last_or_is_none_is_last(layout):
    masks = masks_of(layout)
    masks.of(Clear(3))
    assert masks.text == "last"


def test_all_patterns_of_a_layer_have_text_in_one_place():
    layout = TokenLayout((1, 16, 16), 24, text_first=True)
    masks = LayerMasks(layout, "raster", (64, 16), CPU)
    attention = layer_attention([Clear(2), Dense(), Neighborhood((9, 9))], masks)
    assert attention.mask.head_groups is not None


def test_each_mask_is_built_once():
    masks = masks_of(TokenLayout((1, 16, 16), 24))
    assert masks.of(Clear(3)) is masks.of(Clear(3))
