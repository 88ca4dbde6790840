"""CLEAR: conv-like attention inside a disc."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from dit_accel.arguments import integer, positive
from dit_accel.attention.layer_masks import beside_others
from dit_accel.attention.pooled import POOLING, Patches, Pooled, patch_rows
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.pair_rules import OffsetRule

from .base import Pattern, StaticPattern

if TYPE_CHECKING:
    from dit_accel.attention.call import LayerAttention, LayerSizes
    from dit_accel.attention.layer_masks import LayerMasks


@dataclass(frozen=True)
class Clear(StaticPattern):
    """Image tokens attend to the image tokens with dy^2 + dx^2 < radius^2 (strict), and to all text.

    On a video the disc holds in each frame and all frames are attended. Every token is in its own disc,
    however small; squares are compared exactly.

    Args:
        radius: radius of the disc in tokens; the paper uses 8, 16 and 32 (193, 793 and 3205 keys inside).
        downsample: side of the patches whose pooled keys and values all visual tokens attend to as well, the
            paper's second form (4 there, with a radius of 8 or 16): each the sum over a patch of a frame, of
            weights 1 / downsample^2 unless an adapter brings learned ones. Patches at borders may be cut.
            None: no pooled keys.

    Raises:
        ValueError: a radius that is not positive, or a `downsample` that is no integer of at least 2.

    Source: Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", 2024.
    """

    radius: float
    downsample: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "radius", positive("radius", self.radius))
        if self.downsample is not None:
            object.__setattr__(self, "downsample", integer("downsample", self.downsample, 2))

    @property
    def pools(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.downsample or 0

    @property
    def rest(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "pooled keys" if self.downsample else ""

    def pooled_keys(self, layout: TokenLayout) -> int:
        return layout.grid[0] * math.prod(patch_rows(layout, self.downsample)) if self.downsample else 0

    def learned(self, sizes: LayerSizes) -> dict[str, torch.Tensor]:
        if not self.downsample:
            return {}
        shape, mean = (self.downsample, self.downsample), self.downsample**-2
        return {POOLING: torch.full(shape, mean, dtype=torch.float32, device="cpu")}

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
        if not self.downsample:
            return super().layer_attention(heads, masks)
        mask, patches = masks.of(self), Patches.of(masks.layout, self.downsample, masks.places, masks.device)
        own = Pooled(mask, masks.from_calls(mask), patches=patches)
        return beside_others(own, self, heads, masks)

    @property
    def row_reach(self) -> int | None:
        """Up to the circle, which is outside."""
        return math.ceil(Fraction(self.radius)) - 1

    def without_pooled_keys(self) -> Clear:
        return replace(self, downsample=None)

    def rule(self, layout: TokenLayout) -> OffsetRule:
        most, dtype = self._most(layout), torch.int32 if _farthest(layout) < 2**31 else torch.int64

        def inside(offset: torch.Tensor) -> torch.Tensor:
            dy, dx = offset[..., 1].to(dtype), offset[..., 2].to(dtype)
            return dy * dy + dx * dx <= most

        return OffsetRule(layout, inside, lambda nearest, farthest: (inside(nearest), inside(farthest)))

    def visual_pairs(self, layout: TokenLayout) -> int:
        frames, height, width = layout.grid
        dy = torch.arange(1 - height, height, device="cpu")[:, None]
        dx = torch.arange(1 - width, width, device="cpu")
        inside = dy**2 + dx**2 <= self._most(layout)
        return frames**2 * int(((height - dy.abs()) * (width - dx.abs()))[inside].sum())

    def _most(self, layout: TokenLayout) -> int:
        """The largest dy^2 + dx^2 below radius^2, and no larger than there is on the grid."""
        return min(math.ceil(Fraction(self.radius) ** 2) - 1, _farthest(layout))


def _farthest(layout: TokenLayout) -> int:
    """dy^2 + dx^2 of opposite corners."""
    return (layout.grid[1] - 1) ** 2 + (layout.grid[2] - 1) ** 2
