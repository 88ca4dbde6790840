"""Chunk-causal attention: tokens of a chunk of frames see their own chunk and earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    Raises:
        ValueError: frames that are not a positive integer, or a base with a tail of its own.
        TypeError: a base that is no static pattern.

    Source: Yin et al., "From Slow Bidirectional to Fast Autoregressive Video Diffusion Models" (CausVid),
    2025; Chen et al., "SkyReels-V2: Infinite-length Film Generative Model", 2025.
    """

    frames: int = 3
    base: Pattern | None = None

    @property
    def hides(self) -> bool:
        """Frames to come."""
        return True

    def __post_init__(self):
        object.__setattr__(self, "frames", integer("frames", self.frames, 1))
        if self.base is not None and not isinstance(self.base, StaticPattern):
            raise TypeError(
                "`base` must be a static pattern, as what is chosen by content would be chosen among frames "
                f"to come as well; got {shown(self.base)}"
            )
        if self.base is not None and self.base.own_tail:
            raise ValueError(
                f"`base` {self.base} has a tail, which would let chunks see frames to come; calibrate with "
                "`tails=False`"
            )

    def rule(self, layout: TokenLayout) -> Rule:
        frame = layout.coordinates[:, 0].long()
        chunks = torch.arange(layout.grid[0], device="cpu") // min(self.frames, layout.grid[0])
        causal = FactorRule([Factor(frame, chunks[:, None] >= chunks)])
        if self.base is None or not self.base.sparse:
            return causal
        return BothRules(causal, self.base.rule(layout))

    def visual_pairs(self, layout: TokenLayout) -> int:
        frames, tokens = layout.grid[0], layout.grid[1] * layout.grid[2]
        if self.base is None or not self.base.sparse:
            chunks = [min(self.frames, frames - at) for at in range(0, frames, self.frames)]
            return tokens**2 * sum(n * sum(chunks[: i + 1]) for i, n in enumerate(chunks))
        alone = TokenLayout(layout.grid)
        return round(self.block_mask(alone, order="raster").density * alone.seq_len**2)

    def natural_orders(self, layout: TokenLayout) -> list[torch.Tensor]:
        static = isinstance(self.base, StaticPattern)
        return list(self.base.natural_orders(layout)) if static else []

    def at_step(self, step: int, sigma: float | None = None, total: int | None = None) -> Pattern:
        return self if self.base is None else ChunkCausal(self.frames, self.base.at_step(step, sigma, total))

    @property
    def variants(self) -> Sequence[Pattern]:
        if self.base is None:
            return (self,)
        return [ChunkCausal(self.frames, variant) for variant in self.base.variants]
