"""Two patterns for the two branches of a dual path, in one token order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dit_accel.attention.call import ModelAttention
from dit_accel.attention.dual_path import DualPath
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.errors import UnavailableError
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Pattern


@dataclass(frozen=True)
class Branches(Pattern):
    """A window branch and a full branch (`dit_accel.attention.dual_path`), as a pattern of every head.

    Attributes:
        window: of the window branch, among visual tokens.
        full: of the full branch, one for every head.
    """

    window: Pattern
    full: tuple[Pattern, ...]

    def at_step(self, step: int, sigma: float | None = None, total: int | None = None) -> Pattern:
        return replace(
            self,
            window=self.window.at_step(step, sigma, total),
            full=tuple(pattern.at_step(step, sigma, total) for pattern in self.full),
        )

    @property
    def hides(self) -> bool:
        return any(pattern.hides for pattern in (self.window, *self.full))

    @property
    def by_noise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(pattern.by_noise for pattern in (self.window, *self.full))

    @property
    def variants(self) -> Sequence[Pattern]:
        """Not all that it is at some step, but whether it is more than one."""
        changing = any(len(pattern.variants) > 1 for pattern in (self.window, *self.full))
        return (self, self) if changing else (self,)

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
