"""Chunk-causal attention: tokens of a chunk of frames see their own chunk and earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dit_accel.arguments import integer, shown
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.pair_rules import BothRules, Factor, FactorRule, Rule

from .base import Pattern, StaticPattern


@dataclass(frozen=True)
class ChunkCausal(StaticPattern):
    """Frame f attends to frame g iff g // frames <= f // frames, and where a pattern says so as well.

    The mask of autoregressive video models: SkyReels-V2 with `causal_block_size`, CausVid, Self Forcing. With
    `base`, what that pattern computes of it. A last chunk may be shorter.

    Args:
        frames: of a chunk, in latent frames.
        base: a static pattern, or None for all of the pairs.
        window: how many frames up to the end of its own chunk a chunk sees, as in models that forget what is
            further past; None: all.

    Raises:
        ValueError: frames that are not a positive integer, a window of less than a chunk, or a base with a
            tail of its own.
        TypeError: a base that is no static pattern.

    Source: Yin et al., "From Slow Bidirectional to Fast Autoregressive Video Diffusion Models" (CausVid),
    2025; Chen et al., "SkyReels-V2: Infinite-length Film Generative Model", 2025.
    """

    frames: int = 3
    base: Pattern | None = None
    window: int | None = None

    @property
    def hides(self) -> bool:
        """Frames to come."""
        return True

    def __post_init__(self):
        object.__setattr__(self, "frames", integer("frames", self.frames, 1))
        if self.window is not None:
            object.__setattr__(self, "window", integer("window", self.window, self.frames))
        if self.base is not None and not isinstance(self.base, StaticPattern):
            raise TypeError(
                "`base` must be a static pattern, as what is chosen by content would be chosen among frames "
                f"to come as well; got {shown(self.base)}"
            )
        if self.base is not None and any(variant.pools for variant in self.base.variants):
            raise ValueError(
                f"`base` {self.base} has pooled keys, of frames to come as well; use downsample=None"
            )
        if self.base is not None and self.base.own_tail:
            raise ValueError(
                f"`base` {self.base} has a tail, which would let chunks see frames to come; calibrate with "
                "`tails=False`"
            )

    def rule(self, layout: TokenLayout) -> Rule:
        frame = layout.coordinates[:, 0].long()
        causal = FactorRule([Factor(frame, self._seen(layout.grid[0]))])
        if self.base is None or not self.base.sparse:
            return causal
        return BothRules(causal, self.base.rule(layout))

    def _seen(self, frames: int) -> torch.Tensor:
        """Which frames see which, bool (frames, frames)."""
        size, frame = min(self.frames, frames), torch.arange(frames, device="cpu")
        end = ((frame // size + 1) * size).clamp(max=frames)
        seen = frame < end[:, None]
        return seen if self.window is None else seen & (frame >= end[:, None] - min(self.window, frames))

    def visual_pairs(self, layout: TokenLayout) -> int:
        if self.base is None or not self.base.sparse:
            return (layout.grid[1] * layout.grid[2]) ** 2 * int(self._seen(layout.grid[0]).sum())
        alone = TokenLayout(layout.grid)
        return round(self.block_mask(alone, order="raster").density * alone.seq_len**2)

    def natural_orders(self, layout: TokenLayout) -> list[torch.Tensor]:
        static = isinstance(self.base, StaticPattern)
        return list(self.base.natural_orders(layout)) if static else []

    def at_step(self, step: int, sigma: float | None = None, total: int | None = None) -> Pattern:
        return self if self.base is None else replace(self, base=self.base.at_step(step, sigma, total))

    @property
    def variants(self) -> Sequence[Pattern]:
        if self.base is None:
            return (self,)
        return [replace(self, base=variant) for variant in self.base.variants]
