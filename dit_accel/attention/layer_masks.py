"""What a pattern needs in order to say what a layer computes: the layer's geometry, and masks made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.chunk_layout import ChunkLayout
from dit_accel.masks.layout import TokenLayout

from .arrangement import Arrangement, call_order
from .call import LayerAttention
from .head_groups import HeadGroups

if TYPE_CHECKING:
    from dit_accel.patterns import Pattern

# Moving text takes q, k, v and the output through memory once more: measured on two cores of an EPYC, at 2328
# tokens of 4 heads of 32, it takes as long as attention to 9 keys
_MOVING_KEYS = 9


@dataclass(eq=False)
class LayerMasks:
    """The masks of a layer's patterns, all in one token order and block size; each is built once.

    Attributes:
        layout: of the layer's tokens.
        order: of the visual tokens in masks: int64 (V,), or what `Pattern.block_mask` takes by name.
        block_size: (query, key).
        device: where masks are.
        places: the visual token at each place of the order of calls, int64 (V,); None: the model's own.
        text: where text that comes first in calls stands in masks: `"model"`, there, or `"last"`, so that
            calls move it; None for what is cheaper under the first pattern that is asked for.
    """

    layout: TokenLayout
    order: Any
    block_size: tuple[int, int]
    device: torch.device
    places: torch.Tensor | None = None
    text: str | None = None
    _made: dict[tuple[Pattern, str], BlockMask] = field(default_factory=dict)

    def of(self, pattern: Pattern) -> BlockMask:
        """The mask of a static pattern."""
        if self.text is None:
            self.text = self._cheaper_text(pattern)
        return self._of(pattern, self.text)

    def _of(self, pattern: Pattern, text: str) -> BlockMask:
        key = (pattern, text)
        if key not in self._made:
            options = {"order": self.order, "device": self.device, "text": text}
            self._made[key] = pattern.block_mask(self.layout, self.block_size, **options)
        return self._made[key]

    def _cheaper_text(self, pattern: Pattern) -> str:
        layout = self.layout
        if not layout.text_first or not layout.text_len:
            return "last"
        if all(layout.text_len % size == 0 for size in self.block_size):
            return "model"  # as many blocks, and nothing moves
        in_place, last = (self._of(pattern, text).block_density for text in ("model", "last"))
        return "model" if in_place * layout.seq_len <= last * layout.seq_len + _MOVING_KEYS else "last"

    def from_calls(self, mask: BlockMask) -> Arrangement | None:
        """How tokens go from the order of calls to that of a mask; None where they need not."""
        order = call_order(self.layout) if mask.order is None else mask.order.cpu()
        return Arrangement.between(call_order(self.layout, self.places), order, self.device)

    def keys_from_calls(self, mask: BlockMask) -> Arrangement | None:
        """The same of keys that are other tokens than the queries; None where they are not."""
        if not isinstance(self.layout, ChunkLayout) or mask.key_order is None:
            return None
        given = torch.arange(mask.kv_len, device="cpu")
        order = torch.cat([mask.key_order.cpu(), given[len(mask.key_order) :]])
        return Arrangement.between(given, order, self.device)


def layer_attention(heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
    """What a layer computes whose heads follow these patterns, of which at most one chooses by content.

    That one decides the kind: it knows how to take in heads that do not choose. Where none does, one with
    pooled keys, and else one whose heads have orders of their own.
    """
    leading = max(heads, key=lambda pattern: (pattern.online, pattern.pools > 0, pattern.per_head))
    return leading.layer_attention(heads, masks)


def beside_others(
    own: LayerAttention, pattern: Pattern, heads: Sequence[Pattern], masks: LayerMasks
) -> LayerAttention:
    """What a layer computes whose heads of `pattern` compute `own`, and the others what they say."""
    others = [head for head, other in enumerate(heads) if other != pattern]
    if not others:
        return own
    mine = [head for head, other in enumerate(heads) if other == pattern]
    return HeadGroups(((mine, own), (others, layer_attention([heads[h] for h in others], masks))))
