"""Blocks of tokens in one of the six orders of the axes: what PARO keeps of a head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dit_accel.arguments import integer, integers, shown
from dit_accel.masks import orders
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.pair_rules import Factor, FactorRule
from dit_accel.masks.tiles import pack_bits, unpack_bits

from .base import Grid, StaticPattern


@dataclass(frozen=True)
class ReorderedBlocks(StaticPattern):
    """The pairs of blocks of visual tokens that were kept, blocks being cut along an order of the axes.

    On another grid than its own it is refused; `on` says what it is there.

    Args:
        grid: of the visual tokens that it was made for, (F, H, W).
        order: the axes, slowest first, one of `masks.orders.AXIS_ORDERS`: "HWF" runs over frames fastest.
        block_size: tokens of a block; the last may have fewer.
        blocks: bits of the (n, n) pairs of blocks, row after row, least significant bit first, n being the
            number of blocks. Every block keeps itself.

    Raises:
        ValueError: values outside these forms, or another grid.

    Source: Zhao et al., "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized
    Attention", 2025.
    """

    grid: Grid
    order: str
    block_size: int
    blocks: bytes

    def __post_init__(self):
        object.__setattr__(self, "grid", integers("grid", self.grid, "(F, H, W)", 1))
        object.__setattr__(self, "block_size", integer("block_size", self.block_size, 1))
        if self.order not in orders.AXIS_ORDERS:
            known = ", ".join(orders.AXIS_ORDERS)
            raise ValueError(f"`order` must be one of {known}, got {shown(self.order)}")
        expected = -(-(self.count**2) // 8)
        if not isinstance(self.blocks, bytes) or len(self.blocks) != expected:
            raise ValueError(
                f"`blocks` must be the bits of {self.count} x {self.count} blocks in {expected} bytes, got "
                f"{shown(self.blocks)}"
            )
        own = torch.arange(self.count, device="cpu") * (self.count + 1)  # places of the diagonal
        if not (self._bits[own // 8] >> (own % 8) & 1).all():
            raise ValueError("`blocks` must keep every block's attention to itself")

    @classmethod
    def of(cls, grid: Grid, order: str, block_size: int, kept: torch.Tensor) -> ReorderedBlocks:
        """From bool (n, n)."""
        return cls(grid, order, block_size, bytes(packed_blocks(kept).tolist()))

    @property
    def _bits(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.blocks), dtype=torch.uint8)

    @property
    def count(self) -> int:
        """Blocks along an axis of the table."""
        return -(-self.grid[0] * self.grid[1] * self.grid[2] // self.block_size)

    @property
    @torch.inference_mode(False)
    def table(self) -> torch.Tensor:
        """Which blocks attend to which, bool (n, n); not kept, as thousands of these may be there."""
        return unpack_bits(self._bits)[: self.count**2].view(self.count, self.count)

    def on(self, grid: Grid) -> ReorderedBlocks:
        """What it is on another grid: blocks there attend as their tokens' counterparts, mostly, do here.

        The counterpart of a token is the one at its share of each axis; a pair of blocks is kept where at
        least half of their pairs of tokens would be.
        """
        if grid == self.grid:
            return self
        there = block_labels(grid, self.order, self.block_size)
        coordinates = TokenLayout(grid).coordinates.long()
        own, other = (torch.tensor(n, dtype=torch.int64, device="cpu") for n in (self.grid, grid))
        f, h, w = ((2 * coordinates + 1) * own // (2 * other)).unbind(1)
        here = block_labels(self.grid, self.order, self.block_size)[(f * own[1] + h) * own[2] + w]
        count = int(there.max()) + 1
        holds = torch.zeros(count, self.count, dtype=torch.float32, device="cpu")
        holds.index_put_((there, here), torch.ones_like(here, dtype=torch.float32), accumulate=True)
        sizes = holds.sum(1)
        kept = 2 * (holds @ self.table.float() @ holds.T) >= sizes[:, None] * sizes
        kept.fill_diagonal_(True)
        return replace(self, grid=grid, blocks=bytes(packed_blocks(kept).tolist()))

    def rule(self, layout: TokenLayout) -> FactorRule:
        if layout.grid != self.grid:
            raise ValueError(
                f"these blocks were chosen for grid {self.grid}, got {layout.grid}; calibrate at this size"
            )
        return FactorRule([Factor(block_labels(self.grid, self.order, self.block_size), self.table)])

    def visual_pairs(self, layout: TokenLayout) -> int:
        self.rule(layout)
        sizes = torch.bincount(block_labels(self.grid, self.order, self.block_size))
        return int((sizes[:, None] * sizes)[self.table].sum())

    def natural_orders(self, layout: TokenLayout) -> list[torch.Tensor]:
        return [orders.axes(layout.grid, orders.AXIS_ORDERS[self.order])]

    def __repr__(self) -> str:
        share = float(self.table.double().mean())
        return f"ReorderedBlocks({self.order}, {share:.3f} of {self.count} x {self.count} blocks)"


def block_labels(grid: Grid, order: str, block_size: int) -> torch.Tensor:
    """The block of each visual token, row-major, where they are cut along an order: int64 (V,)."""
    return torch.argsort(orders.axes(grid, orders.AXIS_ORDERS[order])) // block_size


def packed_blocks(kept: torch.Tensor) -> torch.Tensor:
    """Bool (..., n, n) as bits, uint8 (..., ceil(n * n / 8))."""
    flat = kept.flatten(-2)
    return pack_bits(torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 8)))
