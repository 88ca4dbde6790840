"""Two patterns for the two branches of a dual path, in one token order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dit_accel.attention.call import ModelAttention
from dit_accel.attention.dual_path import DualPath
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.errors import UnavailableError
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Pattern

from .wrapping import Wrapping


@dataclass(frozen=True)
class Branches(Wrapping):
    """A window branch and a full branch (`dit_accel.attention.dual_path`), as a pattern of every head.

    Attributes:
        window: of the window branch, among visual tokens.
        full: of the full branch, one for every head.
    """

    window: Pattern
    full: tuple[Pattern, ...]

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return (self.window, *self.full)

    def of_parts(self, change: Callable[[Pattern], Pattern]) -> Pattern:
        return replace(self, window=change(self.window), full=tuple(map(change, self.full)))

    def token_order(
        self,
        layout: TokenLayout,
        block_size: tuple[int, int] = (128, 64),
        order: str | Sequence[int] | torch.Tensor = "auto",
    ) -> torch.Tensor:
        return self.window.token_order(_visual(layout), block_size, order)

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> DualPath:
        layout = masks.layout
        if layout.anchor is not None:
            raise UnavailableError(
                "the dual path has no place for the tokens of a reference image (Kontext); call the pipeline "
                "without one"
            )
        visual = LayerMasks(_visual(layout), masks.order, masks.block_size, masks.device, masks.places)
        window = layer_attention([self.window] * len(heads), visual)
        sparse = any(pattern.sparse for pattern in self.full)
        return DualPath(
            window, layer_attention(self.full, masks) if sparse else ModelAttention(), visual.layout
        )


def _visual(layout: TokenLayout) -> TokenLayout:
    """Of the visual tokens alone."""
    return TokenLayout(layout.grid)
