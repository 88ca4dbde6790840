"""Watching the attention layers of a pipeline while it computes what it always does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dit_accel.attention.call import AttentionCall, LayerAttention
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Pattern

if TYPE_CHECKING:
    from dit_accel.attention.layer_masks import LayerMasks

# takes a layer's name, what it was called with, and what it returned, like q
See = Callable[[str, AttentionCall, torch.Tensor], None]


@dataclass(frozen=True)
class Watched(Pattern):
    """The model's own attention, shown to a function in every call of every layer.

    Args:
        see: the function.
        layer: of which layer; None: each of its own.
    """

    see: See
    layer: str | None = None

    def for_head(self, layer: str | None, head: int) -> Pattern:
        return Watched(self.see, layer)

    def density(self, layout: TokenLayout) -> float:
        return 1.0

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
        return _WatchedAttention(self)


@dataclass(frozen=True, eq=False)
class _WatchedAttention(LayerAttention):
    """The model's own, shown.

    Attributes:
        pattern: whose layer it is.
    """

    pattern: Watched
    mask = None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        out = call.dense(call)
        self.pattern.see(self.pattern.layer or "", call, out)
        return out
