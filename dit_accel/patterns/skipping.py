"""Blocks that weighed nothing are skipped in later steps (LiteAttention): skip bits that last for a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.arguments import integer, is_number, shown
from dit_accel.attention.block_peaks import block_peaks
from dit_accel.attention.call import AttentionCall
from dit_accel.attention.skipping import SkippingAttention
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.tiles import check_block_size

from .block_wise import BlockWise

if TYPE_CHECKING:
    from dit_accel.attention.block_grid import BlockGrid
    from dit_accel.attention.block_routed import BlockRouted
    from dit_accel.attention.layer_masks import LayerMasks
    from dit_accel.masks.block_mask import BlockMask


@dataclass(frozen=True)
class Skipping(BlockWise):
    """Everything at first; a block of keys that weighed next to nothing is skipped for the rest of the run.

    Attention changes little from step to step, so that what one step finds out saves time in all later ones.
    At an executed step a block that it computes is marked, for a block of queries in its head, where for
    each of these queries q

        max_k (scale q.k) <= M_q + threshold ln 2,

    k being the keys of the block and M_q the largest score among all keys that the step computed: no key of
    it has more than 2^threshold of the weight of the query's strongest key. Marks add up, in each guidance
    branch by itself, and are gone with the run, with another size and with `reset`. Only blocks of visual
    tokens are judged; those with text or anchor tokens are always computed. Calls that are in no run, such as
    those of `dit_accel.attention` and in training, compute everything.

    Judging is one more product of all queries and keys, about half of what dense attention takes, in steps
    in which it is done: `every` says how often that is.

    Args:
        threshold: power of two, below 0. Published: -10, and for more speed -6 or -3.
        every: executed steps from one judgement to the next; the first step is judged.
        reset: executed steps after which all marks are taken back; None: never.
        block_size: tokens of a block of queries, and of keys: multiples of 16 and of 8.

    Raises:
        ValueError: values outside these forms.

    Source: "LiteAttention: A Temporal Sparse Attention for Diffusion Transformers", 2025. There a block is
    judged against the largest score of the blocks before it, so that marks depend on the order of blocks;
    here against that of all blocks, which marks the same and what came before its row's largest score.
    """

    threshold: float = -10.0
    every: int = 1
    reset: int | None = None
    block_size: tuple[int, int] = (128, 64)

    def __post_init__(self):
        if not is_number(self.threshold) or not self.threshold < 0:
            raise ValueError(f"`threshold` must be a number below 0, got {shown(self.threshold)}")
        object.__setattr__(self, "threshold", float(self.threshold))
        object.__setattr__(self, "every", integer("every", self.every, 1))
        if self.reset is not None:
            object.__setattr__(self, "reset", integer("reset", self.reset, 1))
        check_block_size(self.block_size)
        object.__setattr__(self, "block_size", tuple(map(int, self.block_size)))

    def left(self, call: AttentionCall, grid: BlockGrid, computed: torch.Tensor) -> torch.Tensor:
        """Of the blocks that a step computed those that are not marked, bool (B, H, *grid.chosen).

        Args:
            call: with its tokens in the order of the blocks.
            computed: bool, like what is returned.
        """
        valid = None if call.text_valid is None else ~grid.padding(call.text_valid)
        every = grid.every(computed)
        peaks = block_peaks(call.q * call.factor, call.k, every, grid.size, rows=grid.chosen[0], valid=valid)
        return computed & (peaks[..., : grid.chosen[1]] > self.threshold * math.log(2))

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
        """See `OnlinePattern.select`: what the step after one with these queries and keys computes.

        `order` is that of the visual tokens, as for `token_order`.
        """
        grid = self.grid(layout, order, q.device)
        q, k = grid.enter(q), grid.enter(k)
        call = AttentionCall(q, k, k, layout, dense=lambda call: call.q, text_valid=text_valid)
        shape = (*q.shape[:2], *grid.chosen)
        return grid.mask(
            self.left(call, grid, torch.ones(shape, dtype=torch.bool, device=q.device)), block_size
        )

    def layer(self, masks: LayerMasks) -> BlockRouted:
        return SkippingAttention.of(self, masks)

    def density(self, layout: TokenLayout) -> float:
        """1, what a first step computes: what later ones do is the content's."""
        return 1.0
