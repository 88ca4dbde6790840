"""Sparse VideoGen: heads are spatial (near frames) or temporal (the same place across frames)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dit_accel.arguments import integer, is_number, positive, shown, switch
from dit_accel.attention.arrangement import call_order
from dit_accel.attention.head_ordered import HeadOrdered
from dit_accel.attention.layer_masks import LayerMasks
from dit_accel.masks import orders
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.pair_rules import PairRule

from .base import Pattern, StaticPattern

if TYPE_CHECKING:
    from dit_accel.masks.block_mask import BlockMask

MOST_ROWS = 65_536  # queries that may be compared
_PROFILE_BYTES = 512 << 20  # working memory of the profile, by which it takes some heads at a time


@dataclass(frozen=True)
class _Band(StaticPattern):
    """A band around the diagonal of the visual tokens, in some order of theirs."""

    keep: float = 0.25
    first_frame_sink: bool = False
    inclusive: bool = False
    block_size: int = 128

    def __post_init__(self):
        if not is_number(self.keep) or not 0 < self.keep <= 1:
            raise ValueError(f"`keep` must be a number above 0 and at most 1, got {shown(self.keep)}")
        object.__setattr__(self, "keep", positive("keep", self.keep))
        object.__setattr__(self, "block_size", integer("block_size", self.block_size, 1))
        for name in ("first_frame_sink", "inclusive"):
            switch(name, getattr(self, name))

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
        size = min(self.block_size, layout.seq_len + 1)  # no band is wider than the sequence
        blocks = self.frames(layout) * layout.grid[1] * layout.grid[2] / size
        if self.inclusive:
            return min(math.ceil(blocks) * size, layout.visual_len)
        if blocks < 1:
            raise ValueError(
                f"`keep` {self.keep} on grid {layout.grid} leaves a band of less than one block of "
                f"{self.block_size} tokens, so that nothing is attended; raise it or lower `block_size`"
            )
        return math.floor(blocks) * size - 1

    def rule(self, layout: TokenLayout) -> PairRule:
        strides = torch.tensor(self._strides(layout), dtype=torch.int32, device="cpu")
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
        q = torch.arange(total, device="cpu")
        first, last = (q - reach).clamp(min=0), (q + reach).clamp(max=total - 1)
        outside_sink = (last - first.clamp(min=sink) + 1).clamp(min=0)
        return int(outside_sink.sum()) + total * sink


@dataclass(frozen=True)
class SpatialHead(_Band):
    """A head that looks at near frames: a band around the diagonal in the model's own order.

    With N all tokens, text included, and s' = (keep N^2 - 2 N text) / N^2, the band is N (1 - sqrt(1 - s'))
    tokens wide, rounded to blocks: |q - k| < floor(...) (HunyuanVideo), or <= ceil(...) where `inclusive`
    (Wan). Every token is in its own band; one of no block is refused.

    Args:
        keep: density aimed at (the published code calls it "sparsity").
        first_frame_sink: whether every query attends to frame 0 (Wan).
        inclusive: the rounding, see above.
        block_size: tokens the width is rounded to; the paper's is 128.

    Raises:
        ValueError: `keep` outside (0, 1], a block size that is not a positive integer; and when applied to a
            layout, a `keep` of less than its text alone takes, or of less than one block.

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


@dataclass(frozen=True)
class SparseVideoGen(Pattern):
    """Each head is a `SpatialHead` or a `TemporalHead`, whichever suits it better, anew in every call.

    The choice, per head and sample: for a few random visual queries, the attention's output under a coarse
    form of either mask is compared with that of full attention, and the kind with the smaller mean squared
    error is taken (spatial when equal). With blocks of `block_size` tokens in a head's own order, the coarse
    masks keep the keys |q block - k block| < floor(profile_frames * H * W / block_size), the sink, and text.

    Both kinds attend to equally many keys, so that densities do not depend on the choice. In a recipe, heads
    compute in their own orders whatever the recipe's `order`.

    Args:
        keep, first_frame_sink, inclusive, block_size: as for `SpatialHead`, of both kinds.
        profile_frames: half width of the coarse masks in frames: 2 (Wan) or 1.5 (HunyuanVideo) in the paper.
        rows: number of queries compared, up to `MOST_ROWS`, drawn with replacement and the same for all
            layers of a step.
        seed: of these draws, which depend on it and on the sampler step alone.

    Raises:
        ValueError: as for `SpatialHead`, and a width, number or seed outside its range; when applied to a
            layout, one of a single frame, or coarse masks of less than one block.

    Source: as for `SpatialHead`.
    """

    keep: float = 0.25
    first_frame_sink: bool = False
    inclusive: bool = False
    block_size: int = 128
    profile_frames: float = 1.5
    rows: int = 64
    seed: int = 0

    def __post_init__(self):
        for name in ("keep", "block_size"):  # checked and made plain by its heads
            object.__setattr__(self, name, getattr(self.spatial, name))
        object.__setattr__(self, "profile_frames", positive("profile_frames", self.profile_frames))
        object.__setattr__(self, "rows", integer("rows", self.rows, 1))
        object.__setattr__(self, "seed", integer("seed", self.seed, 0))
        for name, most in (("rows", MOST_ROWS), ("seed", 2**32 - 1)):
            if getattr(self, name) > most:
                raise ValueError(f"`{name}` must be at most {most}, got {getattr(self, name)}")

    @property
    def spatial(self) -> SpatialHead:
        """What spatial heads are."""
        return SpatialHead(self.keep, self.first_frame_sink, self.inclusive, self.block_size)

    @property
    def temporal(self) -> TemporalHead:
        """What temporal heads are."""
        return TemporalHead(self.keep, self.first_frame_sink, self.inclusive, self.block_size)

    def density(self, layout: TokenLayout) -> float:
        """Computed pairs / S^2, exact, and the same whatever heads choose.

        Raises:
            ValueError: a layout of one frame, or that does not suit `spatial`.
        """
        self._check(layout)
        return self.spatial.density(layout)

    def _check(self, layout: TokenLayout) -> None:
        if layout.grid[0] < 2:
            raise ValueError(
                "SparseVideoGen tells heads of near frames from heads of the same place across frames, but "
                f"grid {layout.grid} has one frame; use another pattern for images"
            )

    online = True

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> HeadOrdered:
        last = replace(masks, text="last")
        made = {self: self.head_mask(masks.layout, masks.block_size, masks.device)}
        made |= {pattern: last.of(pattern) for pattern in dict.fromkeys(heads) if pattern != self}
        return HeadOrdered.of(self, heads, made, masks.layout, call_order(masks.layout, masks.places))

    def head_mask(
        self,
        layout: TokenLayout,
        block_size: tuple[int, int] = (128, 64),
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """The mask of every head, with the visual tokens in the head's own order (see `places`).

        Raises:
            ValueError: a layout of one frame, or that does not suit `spatial`.
        """
        self._check(layout)
        return self.spatial.block_mask(layout, block_size, "raster", device)

    def places(self, layout: TokenLayout) -> torch.Tensor:
        """Where a spatial and where a temporal head see each visual token: int64 (2, V), tokens row-major.

        Raises:
            ValueError: a layout of one frame.
        """
        self._check(layout)
        by_place = orders.axes(layout.grid, (1, 2, 0))
        return torch.stack([orders.raster(layout.grid), torch.argsort(by_place)])

    def sampled(self, layout: TokenLayout, step: int) -> torch.Tensor:
        """The visual tokens that are compared at a sampler step, by row-major index: int64 (rows,)."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        shape = (step + 1, self.rows)
        return torch.randint(layout.visual_len, shape, generator=generator, device="cpu")[step]

    def coarse_reach(self, layout: TokenLayout) -> int:
        """Blocks nearer than this attend to each other in the comparison.

        Raises:
            ValueError: none do.
        """
        width, size = self.profile_frames * layout.grid[1] * layout.grid[2], self._size(layout)
        if width < self.block_size:
            raise ValueError(
                f"`profile_frames` {self.profile_frames} on grid {layout.grid} is less than one block of "
                f"{self.block_size} tokens; raise it or lower `block_size`"
            )
        return math.floor(min(width, size * layout.visual_len) / size)

    def _size(self, layout: TokenLayout) -> int:
        """Tokens of a block of the comparison; one that holds all tokens needs no more."""
        return min(self.block_size, layout.visual_len)

    def coarse_masks(self, layout: TokenLayout, places: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """What visual queries attend to in the comparison, as in a spatial, then in a temporal head.

        Args:
            layout: token geometry.
            places: those of all visual tokens, in any order: int64 (2, V).
            at: where the queries stand in that order, int64 (n,).

        Returns:
            bool (2, n, V), keys in that order.
        """
        block = places // self._size(layout)
        near = (block[:, at, None] - block[:, None]).abs() < self.coarse_reach(layout)
        sink = layout.grid[1] * layout.grid[2] if self.first_frame_sink else 0
        return near | (places < sink)[:, None]

    def are_temporal(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        at: torch.Tensor,
        masks: torch.Tensor,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Which heads of which samples are temporal: bool (B, H).

        Args:
            q, k, v: (B, H, S, D), in any order of the tokens.
            at: where the compared queries stand in q, int64 (n,).
            masks: what they attend to under either coarse mask, bool (2, n, S).
            hidden: keys that no query sees (padded text), bool (B, S), or None.
        """
        exact = torch.promote_types(q.dtype, torch.float32)
        hidden = None if hidden is None else hidden[:, None, None]
        per_head = 3 * len(q) * len(at) * k.shape[2] * exact.itemsize
        errors = []
        at_once = max(1, _PROFILE_BYTES // per_head)
        for first in range(0, q.shape[1], at_once):
            part = slice(first, first + at_once)
            scores = (q[:, part, at] * q.shape[3] ** -0.5 @ k[:, part].mT).to(exact)
            scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
            outputs = [
                scores.masked_fill(~mask, -math.inf).softmax(-1).to(v.dtype) @ v[:, part] for mask in masks
            ]
            full = (scores.softmax(-1).to(v.dtype) @ v[:, part]).to(exact)
            errors.append(torch.stack([(out - full).square().mean((2, 3)) for out in outputs]))
        spatial, temporal = torch.cat(errors, 2)
        return temporal < spatial
