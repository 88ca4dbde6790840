"""Video sparse attention (VSA): the cubes that matter most exactly, all of them coarsely, by a gate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from dit_accel.arguments import integers, is_number, shown
from dit_accel.attention.block_scores import largest
from dit_accel.attention.cubes import Cubes
from dit_accel.attention.video_sparse import GATE, GATE_BIAS, VideoSparseAttention
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.tiles import LARGEST_BLOCK

from .base import OnlinePattern

if TYPE_CHECKING:
    from dit_accel.attention.call import LayerSizes
    from dit_accel.attention.layer_masks import LayerMasks
    from dit_accel.masks.block_mask import BlockMask


@dataclass(frozen=True)
class VideoSparse(OnlinePattern):
    """Each cube of visual tokens attends to its strongest cubes, token by token, and to the means of all.

    With means q_i, k_j, v_j over the tokens of cubes (cut ones at the borders over those that there are):

        w_i = softmax over j of q_i . k_j / sqrt(D),   coarse_i = sum of w_ij v_j,
        out = attention to the ceil(top_k * cubes) cubes of the largest w_i  +  g * coarse_i,

    for each query token of cube i. The gate g = G x + b is learned, per token and channel: x is what the
    layer's queries are projected from, and G, b of each layer are trained (`dit_accel.distill`) from 0, or
    come with a FastWan model's folder as the adapter. Without one the first part is all there is. Text and
    anchor tokens attend to everything and are attended by everything, and have no coarse part.

    Args:
        top_k: share of the cubes that are attended token by token; at least one is. Published: 0.2 in use,
            down to 0.1 in training.
        cube: frames, rows and columns of tokens in a cube, a multiple of 16 tokens in all. For images take
            one frame: (1, 8, 8).

    Raises:
        ValueError: a share or a cube outside these.

    Source: Zhang et al., "VSA: Faster Video Diffusion with Trainable Sparse Attention", 2025.
    """

    top_k: float = 0.2
    cube: tuple[int, int, int] = (4, 4, 4)
    reads_input = True
    rest = "attention between the means of cubes"
    notes = ("the coarse branch of means acts where an adapter brings its gate",)

    def __post_init__(self):
        if not is_number(self.top_k) or not 0 < self.top_k <= 1:
            raise ValueError(f"`top_k` must be a number above 0 and at most 1, got {shown(self.top_k)}")
        object.__setattr__(self, "top_k", float(self.top_k))
        object.__setattr__(self, "cube", integers("cube", self.cube, "(frames, rows, columns)", 1))
        tokens = math.prod(self.cube)
        if tokens % 16 or tokens > LARGEST_BLOCK:
            raise ValueError(
                f"`cube` must have a multiple of 16 tokens, at most {LARGEST_BLOCK}, got {self.cube} of "
                f"{tokens}; (4, 4, 4) is the published one, (1, 8, 8) one for images"
            )

    def learned(self, sizes: LayerSizes) -> dict[str, torch.Tensor]:
        width = sizes.heads * sizes.head_dim
        return {
            GATE: torch.zeros(width, sizes.width, dtype=torch.float32, device="cpu"),
            GATE_BIAS: torch.zeros(width, dtype=torch.float32, device="cpu"),
        }

    def of_input(
        self, x: torch.Tensor, learned: Mapping[str, torch.Tensor], heads: int
    ) -> torch.Tensor | None:
        """The gate, (B, heads, V, D)."""
        if GATE not in learned:
            return None
        gate = F.linear(x, learned[GATE].to(x.dtype), learned[GATE_BIAS].to(x.dtype))
        return gate.unflatten(2, (heads, -1)).transpose(1, 2)

    def kept(self, cubes: int) -> int:
        """How many cubes of so many are attended token by token."""
        return max(1, math.ceil(Fraction(repr(self.top_k)) * cubes))  # as written: 0.07 of 100 is 7

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: TokenLayout,
        *,
        block_size: tuple[int, int] | None = None,
        text_valid: torch.Tensor | None = None,
    ) -> BlockMask:
        """See `OnlinePattern.select`: blocks are cubes, and places that cut ones leave over stand behind the
        model's tokens, S..P-1, so that the mask is (P, P)."""
        cubes = Cubes.of(layout, self.cube, device=q.device)
        if block_size is not None and (cubes.size % block_size[0] or block_size[1] != cubes.size):
            raise ValueError(
                f"`block_size` {tuple(block_size)} must be ({cubes.size} or what divides it, {cubes.size}): "
                "blocks are cubes"
            )
        means = (cubes.means(cubes.enter(x)) for x in (q, k))
        scores = next(means) @ next(means).mT
        return cubes.mask(largest(scores, self.kept(cubes.count)), block_size and block_size[0])

    def layer(self, masks: LayerMasks) -> VideoSparseAttention:
        return VideoSparseAttention.of(self, masks)

    def density(self, layout: TokenLayout) -> float:
        """The share of all pairs that tokens attend to, were all cubes alike."""
        cubes = math.prod(-(-n // side) for n, side in zip(layout.grid, self.cube, strict=True))
        visual, tokens = layout.visual_len, layout.seq_len
        return 1 - (1 - self.kept(cubes) / cubes) * (visual / tokens) ** 2
