"""Sparse VideoGen's two kinds of head: spatial (near frames) and temporal (the same place across frames)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..layout import TokenLayout
from ..rules import PairRule
from .base import Pattern


@dataclass(frozen=True)
class _Band(Pattern):
    """A band around the diagonal of the visual tokens, in some order of theirs."""

    keep: float = 0.25
    first_frame_sink: bool = False
    inclusive: bool = False

    def __post_init__(self):
        if not isinstance(self.keep, (int, float)) or not 0 < self.keep <= 1:
            raise ValueError(f"`keep` must be a number above 0 and at most 1, got {self.keep!r}")

    def _strides(self, layout: TokenLayout) -> tuple[int, int, int]:
        """Steps of a token's place in this head's order along (f, h, w)."""
        raise NotImplementedError

    def frames(self, layout: TokenLayout) -> float:
        """Width of the band in frames, before rounding."""
        total, text = layout.seq_len, layout.text_len
        visual = (self.keep * total**2 - 2 * total * text) / total**2
        if visual <= 0:
            raise ValueError(
                f"`keep` {self.keep} is less than the {text} text tokens alone take of {total}; raise it"
            )
        return total * (1 - math.sqrt(1 - visual)) / (layout.grid[1] * layout.grid[2])

    def reach(self, layout: TokenLayout) -> int:
        """Largest distance inside the band, in tokens of this head's order."""
        blocks = self.frames(layout) * layout.grid[1] * layout.grid[2] / 128
        return math.ceil(blocks) * 128 if self.inclusive else math.floor(blocks) * 128 - 1

    def rule(self, layout: TokenLayout) -> PairRule:
        strides = torch.tensor(self._strides(layout), dtype=torch.int32)
        reach, sink = self.reach(layout), layout.grid[1] * layout.grid[2] if self.first_frame_sink else 0

        def place(token: torch.Tensor) -> torch.Tensor:
            return (token * strides).sum(-1)

        def allows(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return ((place(q) - place(k)).abs() <= reach) | (place(k) < sink)

        def bounds(q_lo, q_hi, k_lo, k_hi):
            q_first, q_last, k_first, k_last = map(place, (q_lo, q_hi, k_lo, k_hi))
            near = torch.maximum(k_first - q_last, q_first - k_last)
            far = torch.maximum(k_last - q_first, q_last - k_first)
            return (near <= reach) | (k_first < sink), (far <= reach) | (k_last < sink)

        return PairRule(layout, allows, bounds)

    def visual_pairs(self, layout: TokenLayout) -> int:
        total, reach = layout.visual_len, self.reach(layout)
        sink = layout.grid[1] * layout.grid[2] if self.first_frame_sink else 0
        q = torch.arange(total)
        first, last = (q - reach).clamp(min=0), (q + reach).clamp(max=total - 1)
        outside_sink = (last - torch.maximum(first, torch.tensor(sink)) + 1).clamp(min=0)
        return int(outside_sink.sum()) + total * sink


@dataclass(frozen=True)
class SpatialHead(_Band):
    """A head that looks at near frames: a band around the diagonal in the model's own order.

    With N all tokens, text included, and s' = (keep N^2 - 2 N text) / N^2, the band is N (1 - sqrt(1 - s'))
    tokens wide, rounded to blocks of 128: |q - k| < floor(...) (HunyuanVideo), or <= ceil(...) where
    `inclusive` (Wan).

    Args:
        keep: density aimed at (the published code calls it "sparsity").
        first_frame_sink: whether every query attends to frame 0 (Wan).
        inclusive: the rounding, see above.

    Raises:
        ValueError: `keep` outside (0, 1]; and when applied to a layout, less than its text alone takes.

    Source: Xi et al., "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal
    Sparsity", 2025.
    """

    def _strides(self, layout: TokenLayout) -> tuple[int, int, int]:
        return layout.grid[1] * layout.grid[2], layout.grid[2], 1


@dataclass(frozen=True)
class TemporalHead(_Band):
    """A head that looks at the same place across frames: the same band, ordered by place, then frame.

    Arguments, errors and source as for `SpatialHead`. As in the published code the sink is taken in that
    order: the first H * W / F places of every frame, not frame 0.
    """

    def _strides(self, layout: TokenLayout) -> tuple[int, int, int]:
        return 1, layout.grid[0] * layout.grid[2], layout.grid[0]
