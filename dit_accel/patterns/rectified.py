"""Rectified sparse attention: rescaled to its true share, with pooled values for what it leaves out."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.arguments import integer, is_number, shown, switch
from dit_accel.attention.block_grid import BlockGrid
from dit_accel.attention.block_routed import BlockRouted
from dit_accel.attention.block_scores import block_means, top_blocks
from dit_accel.attention.call import AttentionCall
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.attention.rectified import RectifiedAttention, shares
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.order_choice import order_of_blocks
from dit_accel.masks.tiles import check_block_size

from .base import Pattern, StaticPattern
from .block_wise import BlockWise
from .clustered import Clustered
from .routed import Routed

if TYPE_CHECKING:
    from dit_accel.masks.block_mask import BlockMask

_ORDERS = ("gilbert", "auto", "raster", "tile", "hilbert")


@dataclass(frozen=True)
class Rectified(BlockWise):
    """Sparse attention that is scaled down to its true share, with pooled values for the blocks left out.

    Dropping blocks makes the softmax of the rest too large. By the pooled scores of blocks of visual tokens
    and of each text token (`dit_accel.attention.rectified.shares`) every block of keys has a share P_ij of
    what a block of queries attends to; a block that is left out is pooled, unless pooling it loses more than
    it says (`trusted`); the output is R_i x sparse attention + the sum over pooled blocks of P_ij x mean v_j,
    with R_i the share of all that is not pooled. Blocks have means over the tokens that they have.

    With `base=None` blocks are chosen as published: those of the largest shares, ranked beside the text as
    one, until the sum has passed `mass`, and at least `least`; and the blocks that are neighbours in the
    grid. Text is always attended. With a `base` its mask is what is kept: of a block that it keeps in part,
    that part.

    Args:
        base: a static pattern, `Routed` or `Clustered`, or None.
        mass: share of the attention up to which blocks are chosen.
        least: number of blocks that are chosen at least.
        neighbours: whether blocks are kept that have tokens next to each other, diagonally too.
        order: of the visual tokens where the recipe says `"auto"`: `"gilbert"`, the generalised Hilbert
            curve, or a name that recipes know. A `base` has its own.
        block_size: tokens of a block of queries and of keys, a multiple of 16.
        gain_aware: whether blocks are pooled only where that is to be trusted; if not, all are.

    Raises:
        ValueError: values outside these forms; when applied to a layer, kernel blocks that do not divide
            `block_size`, or a `base` that does not suit the layout or has pooled keys.
        UnavailableError: in a call with a `tail`, which stands for the same blocks.

    Source: "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation", 2025. There a
    last, shorter block is padded with zeros, and Wan's first frame attends to itself in full.
    """

    base: Pattern | None = None
    _: KW_ONLY
    mass: float = 0.3
    least: int = 1
    neighbours: bool = True
    order: str = "gilbert"
    block_size: int = 128
    gain_aware: bool = True
    refresh = 1  # a choice is made in every call

    def __post_init__(self):
        if self.base is not None and not isinstance(self.base, (StaticPattern, Routed, Clustered)):
            raise ValueError(
                f"`base` must be a static pattern, Routed, Clustered or None, got {shown(self.base)}"
            )
        if not is_number(self.mass) or not 0 < self.mass <= 1:
            raise ValueError(f"`mass` must be a number above 0 and at most 1, got {shown(self.mass)}")
        object.__setattr__(self, "mass", float(self.mass))
        for name in ("least", "block_size"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 1))
        for name in ("neighbours", "gain_aware"):
            switch(name, getattr(self, name))
        if self.order not in _ORDERS:
            raise ValueError(f"`order` must be one of {', '.join(_ORDERS)}, got {shown(self.order)}")
        check_block_size((self.block_size, self.block_size))

    # -- what is kept ----------------------------------------------------------------------------------------

    def chosen(self, call: AttentionCall, grid: BlockGrid) -> torch.Tensor:
        """The chosen blocks of visual tokens alone, bool (B, H, *grid.chosen); tokens stand as in `grid`."""
        visual = (x[:, :, : call.layout.visual_len] for x in (call.q, call.k))
        weights = shares(*(block_means(x, self.block_size) for x in visual), call, self.block_size)
        ranked = torch.cat(weights, -1)
        kept = top_blocks(ranked, top_p=self.mass, crossing=True, least=self.least)
        return kept[:, :, : grid.chosen[0], : grid.chosen[1]]

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: TokenLayout,
        *,
        block_size: tuple[int, int] | None = None,
        text_valid: torch.Tensor | None = None,
    ) -> BlockMask:
        """See `OnlinePattern.select`: what is kept, not what stands for the rest."""
        if isinstance(self.base, StaticPattern):
            return self.base.block_mask(layout, block_size or (128, 64), device=q.device)
        if self.base is not None:
            return self.base.select(q, k, layout, block_size=block_size, text_valid=text_valid)
        grid = self.grid(layout, "auto", q.device)
        q, k = grid.enter(q), grid.enter(k)
        call = AttentionCall(q, k, k, layout, dense=lambda call: call.q, text_valid=text_valid)
        return grid.mask(self.chosen(call, grid), block_size)

    def density(self, layout: TokenLayout) -> float:
        """The share of all pairs that it aims at: the base's, else about what `mass` and neighbours take."""
        if self.base is not None:
            return self.base.density(layout)
        grid = self.grid(layout)
        kept = max(self.mass, self.least / max(1, grid.chosen[1]))
        return float(grid.always.double().clamp(min=min(1.0, kept)).mean())

    # -- blocks ----------------------------------------------------------------------------------------------

    def token_order(
        self, layout: TokenLayout, block_size: tuple[int, int] = (128, 64), order: Any = "auto"
    ) -> torch.Tensor:
        """The order of the visual tokens, int64 (V,), that `order` names, or a permutation of them."""
        if self.base is not None:
            return self.base.token_order(layout, block_size, order)
        named = self.order if isinstance(order, str) and order == "auto" else order
        named = "hilbert" if isinstance(named, str) and named == "gilbert" else named
        return order_of_blocks(layout.grid, self.block_size, named)

    def made_grid(self, layout: TokenLayout, visual: torch.Tensor) -> BlockGrid:
        """Neighbours, and those with text, are marked as always kept."""
        grid = BlockGrid.of(layout, (self.block_size, self.block_size), visual)
        if self.neighbours:
            near = adjacent_blocks(layout, visual, self.block_size)
            rows, columns = near.shape
            grid.always[:rows, :columns].logical_or_(near)
        return grid

    def layer(self, masks: LayerMasks) -> RectifiedAttention:
        if self.base is None:
            return RectifiedAttention(self, BlockRouted.of(self, masks), masks.layout)
        layout, sizes = masks.layout, masks.block_size
        if layout.anchor is not None and not self.base.anchor_sees_visual:
            raise ValueError(
                f"`base` {self.base} lets anchor tokens see no visual ones; use a layout without"
            )
        if isinstance(self.base, StaticPattern) and self.base.pooled_keys(layout):
            raise ValueError(
                f"`base` {self.base} has pooled keys, and Rectified has its own; use one of them"
            )
        inner = layer_attention([self.base], replace(masks, text="last"))
        sizes = getattr(inner, "block_size", sizes)
        if any(self.block_size % size for size in sizes):
            raise ValueError(
                f"`block_size` {self.block_size} must be a multiple of the blocks {tuple(sizes)} of the mask "
                "that is rectified; give the recipe a `block_size` that divides it"
            )
        return RectifiedAttention(self, inner, layout)


def adjacent_blocks(layout: TokenLayout, visual: torch.Tensor, size: int) -> torch.Tensor:
    """Which blocks have tokens next to each other in the grid, diagonally too, or are the same: bool (n, n).

    `visual` is the visual token at each place, int64 (V,).
    """
    block = (torch.argsort(visual) // size).view(layout.grid)
    count = -(-layout.visual_len // size)
    near = torch.eye(count, dtype=torch.bool, device="cpu")
    for shift in product((-1, 0, 1), repeat=3):
        here = tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(shift, layout.grid, strict=True))
        there = tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(shift, layout.grid, strict=True))
        near[block[here].flatten(), block[there].flatten()] = True
    return near
