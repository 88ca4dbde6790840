"""Routed attention: each block of queries attends to the blocks of keys that its content asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.arguments import integer, is_number, positive, shown, switch
from dit_accel.attention.block_grid import BlockGrid
from dit_accel.attention.block_routed import BlockRouted
from dit_accel.attention.block_scores import antidiagonal_weights, mean_weights, self_similarity, top_blocks
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.tiles import check_block_size

from .base import StaticPattern
from .block_wise import BlockWise

if TYPE_CHECKING:
    from dit_accel.attention.call import AttentionCall
    from dit_accel.attention.layer_masks import LayerMasks
    from dit_accel.masks.block_mask import BlockMask


@dataclass(frozen=True)
class Routed(BlockWise):
    """Each block of queries attends to the blocks of keys that weigh most for it, whole, anew in every call.

    Weights are those of blocks of visual tokens; blocks with text or anchor tokens are always kept, rows and
    columns. With mean q_i and k_j of the blocks, `score="mean"` weighs softmax_j(q_i . k_j / sqrt d), and
    `score="antidiagonal"` the attention mass that every `stride`-th antidiagonal of the scores gives
    (`dit_accel.attention.block_scores`). Blocks are cut in the token order of the recipe (`"auto"`: that of
    `union`, else the model's own), and the choice is in whole blocks.

    Published methods as settings:

    - SpargeAttn: `top_k=0.5` or `top_p=0.98` with `similarity`, `smooth_keys=True`, blocks of 128 x 64;
    - XAttention: `score="antidiagonal", stride=8, top_p=0.9, crossing=True, block_size=(128, 128)`;
    - BiFormer's routing: `top_k` alone, of regions of `block_size`;
    - NABLA: `top_p, crossing=True, block_size=(64, 64)` and a `SlidingTile` as `union`.

    Args:
        top_k: share of the blocks of keys that is kept: int(top_k * blocks), at least one.
        top_p: share of the weight that is kept, the largest first; at least one block. Given both, whichever
            are more.
        crossing: whether the block that takes the sum beyond `top_p` is kept.
        similarity: blocks whose tokens have a mean cosine with each other of at most this are attended and
            attend in full, as their mean says little of them; None: none are.
        smooth_keys: whether the mean key is taken off all keys first, which changes cosines and rounding.
        sink: whether the first block of keys is always kept.
        score: `"mean"` or `"antidiagonal"`.
        stride: of the antidiagonals; divides the blocks. Scoring takes 1 / (2 stride) of the products of
            dense attention.
        union: a static pattern; blocks that it attends to at all are always kept.
        block_size: tokens of a block of queries, and of keys: multiples of 16 and of 8.
        pv_threshold: SpargeAttn's: values of a chosen block are not added to the result where none of its
            scores is within 2^-pv_threshold of its row's largest so far, see
            `dit_accel.kernels.block_sparse.reference.skipped`; 50 as published, which leaves out next to
            nothing. None: all are. No gradients; not in the backends gather and flex.
        refresh: executed steps of a run for which a choice is used, in each guidance branch by itself. More
            than 1 has an effect in runs without gradients, as pipelines make them: others may have other
            samples in every call.

    Raises:
        ValueError: values outside these forms, neither `top_k` nor `top_p`, or a `stride` that does not
            divide the blocks; when applied to a layout, a `union` that does not fit it.

    Sources: Zhang et al., "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference", 2025; Xu
    et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", 2025; Zhu et al., "BiFormer:
    Vision Transformer with Bi-Level Routing Attention", 2023; Mikhailov et al., "NABLA: Neighborhood
    Adaptive Block-Level Attention", 2025.
    """

    top_k: float | None = None
    top_p: float | None = None
    crossing: bool = False
    similarity: float | None = None
    smooth_keys: bool = False
    sink: bool = False
    score: str = "mean"
    stride: int = 8
    union: StaticPattern | None = None
    block_size: tuple[int, int] = (128, 64)
    pv_threshold: float | None = None
    refresh: int = 1

    def __post_init__(self):
        for name in ("top_k", "top_p"):
            _share(self, name)
        if self.top_k is None and self.top_p is None:
            raise ValueError("give `top_k` (a share of the blocks), `top_p` (of the weight) or both")
        for name in ("crossing", "smooth_keys", "sink"):
            switch(name, getattr(self, name))
        if self.similarity is not None:
            if not is_number(self.similarity):
                raise ValueError(f"`similarity` must be a number or None, got {shown(self.similarity)}")
            object.__setattr__(self, "similarity", float(self.similarity))
        if self.score not in ("mean", "antidiagonal"):
            raise ValueError(f"`score` must be 'mean' or 'antidiagonal', got {shown(self.score)}")
        for name in ("stride", "refresh"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 1))
        if self.union is not None and not isinstance(self.union, StaticPattern):
            raise ValueError(f"`union` must be a static pattern or None, got {shown(self.union)}")
        check_block_size(self.block_size)
        object.__setattr__(self, "block_size", tuple(map(int, self.block_size)))
        if self.score == "antidiagonal" and any(size % self.stride for size in self.block_size):
            raise ValueError(f"`stride` must divide `block_size` {self.block_size}, got {self.stride}")
        if self.pv_threshold is not None:
            if not is_number(self.pv_threshold) or not self.pv_threshold > 0:
                raise ValueError(
                    f"`pv_threshold` must be a number above 0 or None, got {shown(self.pv_threshold)}"
                )
            object.__setattr__(self, "pv_threshold", float(positive("pv_threshold", self.pv_threshold)))

    # -- what is chosen --------------------------------------------------------------------------------------

    def choose(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The chosen blocks of queries and keys, bool (B, H, blocks of queries, blocks of keys).

        Args:
            q, k: (B, H, n, D), in the order of the blocks, the last of which may be shorter.
        """
        (bq, bk), like, unlike = self.block_size, None, None
        if not (q.shape[2] and k.shape[2]):  # all blocks hold text
            shape = (*q.shape[:2], -(-q.shape[2] // bq), -(-k.shape[2] // bk))
            return torch.zeros(shape, dtype=torch.bool, device=q.device)
        if self.smooth_keys:
            k = k - k.mean(2, keepdim=True)
        if self.similarity is not None:
            unlike = self_similarity(k, bk) <= self.similarity
            like = self_similarity(q, bq) > self.similarity
        if self.score == "mean":
            weights = mean_weights(q, k, self.block_size, unlike)
        else:
            weights = antidiagonal_weights(q, k, self.block_size, self.stride)
            weights = weights if unlike is None else weights.masked_fill(unlike[:, :, None], 0)
        chosen = top_blocks(weights, top_k=self.top_k, top_p=self.top_p, crossing=self.crossing)
        if like is not None and unlike is not None:
            chosen = chosen | unlike[:, :, None] | ~like[..., None]
        return chosen

    def chosen(self, call: AttentionCall, grid: BlockGrid) -> torch.Tensor:
        """The same of a call in the order of the blocks."""
        return self.choose(*grid.visual(call.q, call.k))

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: TokenLayout,
        *,
        block_size: tuple[int, int] | None = None,
        text_valid: torch.Tensor | None = None,
        order: Any = "auto",
    ) -> BlockMask:
        """See `OnlinePattern.select`; `order` is that of the visual tokens, as for `token_order`.

        Padded text changes nothing of the choice: blocks with text are always kept.
        """
        grid = self.grid(layout, order, q.device)
        q, k = grid.visual(grid.enter(q), grid.enter(k))
        return grid.mask(self.choose(q, k), block_size)

    # -- blocks ----------------------------------------------------------------------------------------------

    def token_order(
        self, layout: TokenLayout, block_size: tuple[int, int] = (128, 64), order: Any = "auto"
    ) -> torch.Tensor:
        """The order of the visual tokens, int64 (V,), that `order` names, or a permutation of them.

        `"auto"` is that of `union`, else the model's own; the others are as for `StaticPattern.block_mask`.
        """
        if self.union is not None:
            return self.union.token_order(layout, self.block_size, order)
        return super().token_order(layout, order=order)

    def made_grid(self, layout: TokenLayout, visual: torch.Tensor) -> BlockGrid:
        """Those of `union`, `sink` and text are marked as always kept."""
        grid = super().made_grid(layout, visual)
        if self.sink:
            grid.always[:, 0] = True
        if self.union is not None:
            if self.union.pooled_keys(layout):
                raise ValueError(f"`union` must attend to tokens alone, and {self.union} has pooled keys")
            mask = self.union.block_mask(layout, self.block_size, visual)
            grid.always.logical_or_(mask.block_tiles()[0] != -1)
        return grid

    def layer(self, masks: LayerMasks) -> BlockRouted:
        return BlockRouted.of(self, masks)

    def density(self, layout: TokenLayout) -> float:
        """The share of all pairs that it aims at; of `top_p` the most that it takes, as that is content's.

        Blocks that `similarity` adds are not counted, nor the one that crosses.
        """
        grid = self.grid(layout)
        columns = grid.chosen[1]
        share = 0.0 if self.top_k is None else max(1, int(self.top_k * columns)) / max(1, columns)
        return grid.density(max(share, self.top_p or 0.0))


def _share(pattern: Any, name: str) -> None:
    """Checks a share of None or above 0 up to 1, and makes it plain."""
    value = getattr(pattern, name)
    if value is None:
        return
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"`{name}` must be a number above 0 and at most 1, or None, got {shown(value)}")
    object.__setattr__(pattern, name, float(positive(name, value)))
