"""CLEAR: conv-like attention inside a disc."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch

from dit_accel.arguments import positive
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.pair_rules import OffsetRule

from .base import StaticPattern


@dataclass(frozen=True)
class Clear(StaticPattern):
    """Image tokens attend to the image tokens with dy^2 + dx^2 < radius^2 (strict), and to all text.

    On a video the disc holds in each frame and all frames are attended. Every token is in its own disc,
    however small; squares are compared exactly.

    Args:
        radius: radius of the disc in tokens; the paper uses 8, 16 and 32 (193, 793 and 3205 keys inside).
        downsample: factor of the pooled keys of the paper's second form; not available in this version.

    Raises:
        ValueError: a radius that is not positive.

    Source: Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", 2024.
    """

    radius: float
    downsample: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "radius", positive("radius", self.radius))
        if self.downsample is not None:
            raise ValueError(
                f"`downsample` (pooled keys) is not available yet: use None, got {self.downsample}"
            )

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
