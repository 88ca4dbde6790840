"""CLEAR: conv-like attention inside a disc."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layout import TokenLayout
from ..rules import OffsetRule
from .base import Pattern


@dataclass(frozen=True)
class Clear(Pattern):
    """Image tokens attend to the image tokens with dy^2 + dx^2 < radius^2 (strict), and to all text.

    On a video the disc holds in each frame and all frames are attended.

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
        if not isinstance(self.radius, (int, float)) or not self.radius > 0:
            raise ValueError(f"`radius` must be a positive number, got {self.radius!r}")
        if self.downsample is not None:
            raise ValueError(
                f"`downsample` (pooled keys) is not available yet: use None, got {self.downsample}"
            )

    def rule(self, layout: TokenLayout) -> OffsetRule:
        def inside(offset: torch.Tensor) -> torch.Tensor:
            return offset[..., 1] ** 2 + offset[..., 2] ** 2 < self.radius**2

        return OffsetRule(layout, inside, lambda nearest, farthest: (inside(nearest), inside(farthest)))

    def visual_pairs(self, layout: TokenLayout) -> int:
        frames, height, width = layout.grid
        dy, dx = torch.arange(1 - height, height)[:, None], torch.arange(1 - width, width)
        inside = dy**2 + dx**2 < self.radius**2
        return frames**2 * int(((height - dy.abs()) * (width - dx.abs()))[inside].sum())
