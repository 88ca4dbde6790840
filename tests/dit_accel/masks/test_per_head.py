import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.masks.per_head import join_heads
from dit_accel.patterns import Clear, Dense, Neighborhood

LAYOUT = TokenLayout((1, 7, 9), text_len=5, text_first=True)
PATTERNS = [Clear(3), Dense(), Neighborhood((3, 3))]


@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_each_head_follows_its_own_pattern(order):
    masks = {p: p.block_mask(LAYOUT, (16, 16), order=order) for p in PATTERNS}
    heads = [PATTERNS[i] for i in (2, 0, 0, 1)]
    joined = join_heads(masks, heads)
    assert joined.num_groups == 3
    assert torch.equal(joined.to_token_mask(), torch.stack([p.token_mask(LAYOUT) for p in heads]))
    assert joined.density == pytest.approx(sum(p.density(LAYOUT) for p in heads) / 4)


def test_one_pattern_stays_as_it_is():
    masks = {p: p.block_mask(LAYOUT, (16, 16)) for p in PATTERNS}
    assert join_heads(masks, [PATTERNS[0]] * 4) is masks[PATTERNS[0]]


def test_masks_that_do_not_fit():
    first = Clear(3).block_mask(LAYOUT, (16, 16), order="raster")
    with pytest.raises(ValueError, match="different geometry"):
        join_heads({0: first, 1: Clear(3).block_mask(LAYOUT, (32, 16))}, [0, 1])
    with pytest.raises(ValueError, match="different token orders"):
        join_heads({0: first, 1: Clear(3).block_mask(LAYOUT, (16, 16), order="hilbert")}, [0, 1])
