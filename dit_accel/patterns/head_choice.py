"""What one head was given: a static pattern in the token order that suits it, with a tail or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dit_accel.attention.arrangement import call_order
from dit_accel.attention.head_masked import HeadMasked
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.pair_rules import Rule

from .base import Grid, Pattern, StaticPattern
from .reordered_blocks import ReorderedBlocks

if TYPE_CHECKING:
    from dit_accel.attention.call import LayerAttention
    from dit_accel.attention.layer_masks import LayerMasks
    from dit_accel.masks.block_mask import BlockMask


@dataclass(frozen=True)
class HeadChoice(StaticPattern):
    """A static pattern of one head.

    Args:
        pattern: without pooled keys.
        tail: whether what it leaves out contributes by its means, as `Recipe.tail` says for whole layers.
        grid: the only one that it is for; None: it is taken to any, see `ReorderedBlocks.on`.
    """

    pattern: StaticPattern
    tail: bool = False
    grid: Grid | None = None
    per_head = True

    def on(self, layout: TokenLayout) -> StaticPattern:
        """The pattern on a layout.

        Raises:
            ValueError: a layout with another grid than it is for.
        """
        if self.grid not in (None, layout.grid):
            raise ValueError(
                f"this calibration was made for grid {self.grid}, got {layout.grid}; calibrate at this size, "
                "or use `rescale=True`"
            )
        return self.pattern.on(layout.grid) if isinstance(self.pattern, ReorderedBlocks) else self.pattern

    @property
    def sparse(self) -> bool:
        return self.pattern.sparse

    @property
    def hides(self) -> bool:
        return self.pattern.hides

    @property
    def anchor_sees_visual(self) -> bool:
        return self.pattern.anchor_sees_visual

    @property
    def own_tail(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.tail

    def rule(self, layout: TokenLayout) -> Rule:
        return self.on(layout).rule(layout)

    def visual_pairs(self, layout: TokenLayout) -> int:
        return self.on(layout).visual_pairs(layout)

    def natural_orders(self, layout: TokenLayout) -> list[torch.Tensor]:
        return self.on(layout).natural_orders(layout)

    def token_order(self, layout: TokenLayout, *args, **options) -> torch.Tensor:
        """The model's own: tokens are put into each head's order in its layer."""
        return Pattern.token_order(self, layout)

    def own_mask(self, masks: LayerMasks) -> BlockMask:
        """In the order that suits it, text last."""
        pattern, order = self.on(masks.layout), "auto"
        if isinstance(pattern, ReorderedBlocks):
            order = pattern.natural_orders(masks.layout)[0]
        return pattern.block_mask(masks.layout, masks.block_size, order, masks.device)

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
        choices = [p if isinstance(p, HeadChoice) else HeadChoice(p) for p in map(_resolved, heads)]
        first = {choice.pattern: choice for choice in choices}
        made = {pattern: choice.own_mask(masks) for pattern, choice in first.items()}
        tails = ["pooled" if choice.tail else None for choice in choices]
        calls = call_order(masks.layout, masks.places)
        return HeadMasked.of([made[choice.pattern] for choice in choices], tails, calls)

    @property
    def kind(self) -> str:
        """In a word or two: `"HWF"`, along which order blocks are cut, or the name of a pattern."""
        pattern = self.pattern
        name = pattern.order if isinstance(pattern, ReorderedBlocks) else type(pattern).__name__
        return f"{name} with a tail" if self.tail else name

    def __str__(self) -> str:
        return self.kind


def _resolved(pattern: Pattern) -> Pattern:
    """What a pattern is at the first step, where it changes and none is under way."""
    return pattern.at_step(0, sigma=0.0)
