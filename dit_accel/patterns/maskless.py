"""Patterns without a mask, whose visual queries read all keys by a cheaper formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dit_accel.attention.layer_masks import beside_others
from dit_accel.masks.layout import TokenLayout

from .base import Pattern

if TYPE_CHECKING:
    from dit_accel.attention.call import LayerAttention
    from dit_accel.attention.layer_masks import LayerMasks


class Maskless(Pattern):
    """A student of dense attention without a mask. A new one states its `layer` and `density`.

    Text and anchor tokens attend to everything; visual tokens read them as they read other visual ones. It
    counts as one that is chosen by content: a layer has at most one such pattern.
    """

    online = True
    blocks = False

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
        return beside_others(self.layer(masks), self, heads, masks)

    def layer(self, masks: LayerMasks) -> LayerAttention:
        """What a layer computes all of whose heads follow it."""
        raise NotImplementedError

    def density(self, layout: TokenLayout) -> float:
        """What is computed of scores, as a share of those of all pairs of tokens."""
        raise NotImplementedError
