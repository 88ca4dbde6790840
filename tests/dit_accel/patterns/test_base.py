"""What static and online patterns share, and what a new one of either kind has to state."""

from dataclasses import dataclass

import pytest
import torch
from pattern_cases import FORMS

from dit_accel import BlockMask, Recipe, TokenLayout
from dit_accel.kernels import block_sparse_attention
from dit_accel.masks import orders
from dit_accel.masks.pair_rules import PairRule
from dit_accel.patterns import (
    Clear,
    OnlinePattern,
    Pattern,
    Radial,
    StaticPattern,
)
from dit_accel.patterns.radial import radial_cells

LAYOUT = TokenLayout((2, 4, 6), 5)


@dataclass(frozen=True)
class SameFrame(StaticPattern):
    """Tokens attend to their own frame."""

    def rule(self, layout: TokenLayout) -> PairRule:
        def same(q, k):
            return q[..., 0] == k[..., 0]

        def bounds(q_lo, q_hi, k_lo, k_hi):
            never = (q_lo > k_hi) | (k_lo > q_hi)
            one = (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo)
            return ~never[..., 0], one[..., 0]

        return PairRule(layout, same, bounds)

    def visual_pairs(self, layout: TokenLayout) -> int:
        frames, height, width = layout.grid
        return frames * (height * width) ** 2


@dataclass(frozen=True)
class NearestKeys(OnlinePattern):
    """Queries attend to the keys whose score is at least their mean score."""

    margin: float = 0.0

    def select(self, q, k, layout, *, block_size=None, text_valid=None) -> BlockMask:
        scores = (q @ k.mT).mean((0, 1))
        chosen = scores >= scores.mean(1, keepdim=True) + self.margin
        return BlockMask.from_token_mask(chosen, block_size or (16, 16), text=(0, 0))


def test_a_static_pattern_states_its_rule_and_its_pairs():
    mask = SameFrame().block_mask(LAYOUT, (16, 8))
    exact = SameFrame().token_mask(LAYOUT)
    assert torch.equal(mask.to_token_mask(), exact)
    assert SameFrame().density(LAYOUT) == exact.double().mean().item() < 1


def test_an_online_pattern_states_its_selection():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, LAYOUT.seq_len, 8, generator=generator) for _ in range(2))
    mask = NearestKeys().select(q, k, LAYOUT)
    assert mask.seq_len == LAYOUT.seq_len
    assert 0 < mask.density < 1


@pytest.mark.parametrize("use", [NearestKeys().token_mask, NearestKeys().block_mask])
def test_an_online_pattern_has_no_mask_of_its_own(use):
    with pytest.raises(TypeError, match=r"NearestKeys\(margin=0.0\) has no mask before it sees queries"):
        use(LAYOUT)


@pytest.mark.parametrize("pattern", [SameFrame(), NearestKeys()], ids=str)
def test_both_are_patterns_and_make_recipes(pattern):
    assert isinstance(pattern, Pattern)
    assert pattern.at_step(3) == pattern
    assert pattern.variants == (pattern,)
    assert Recipe(pattern).attention == pattern


class TestInferenceMode:
    """What a generating run makes and keeps can be trained with: autograd refuses inference tensors."""

    def layout(self) -> TokenLayout:
        """Anew, with nothing cached."""
        radial_cells.cache_clear()
        orders.hilbert.cache_clear()
        orders.inside_tile.cache_clear()
        return TokenLayout((3, 6, 8), 5)

    @pytest.mark.parametrize("order", ["auto", "hilbert", "tile"])
    @pytest.mark.parametrize("pattern", FORMS.values(), ids=FORMS)
    def test_a_mask_made_in_it_trains(self, pattern, order):
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(3, 1, 2, 149, 8, generator=generator)

        def gradients(mask: BlockMask) -> torch.Tensor:
            leaves = qkv.clone().requires_grad_()
            reordered = leaves if mask.order is None else leaves[:, :, :, mask.order]
            out = block_sparse_attention(*reordered, mask, backend="gather")
            out.square().sum().backward()
            return leaves.grad

        expected = gradients(pattern.block_mask(self.layout(), (16, 16), order))
        with torch.inference_mode():
            layout = self.layout()
            mask = pattern.block_mask(layout, (16, 16), order)
        assert torch.equal(gradients(mask), expected)
        again = pattern.block_mask(layout, (16, 16), order)  # from what was cached then
        assert torch.equal(gradients(again), expected)

    def test_what_is_cached_is_no_inference_tensor(self):
        with torch.inference_mode():
            layout = self.layout()
            kept = [
                layout.coordinates,
                radial_cells(Radial(0.2, 16), layout),
                orders.hilbert(layout.grid),
                orders.inside_tile((1, 2, 4)),
            ]
            permutation = torch.randperm(layout.visual_len)
            mask = Clear(2).block_mask(layout, (16, 16), permutation)
        assert permutation.is_inference()
        assert not any(x.is_inference() for x in (*kept, mask.order, mask.tiles))
