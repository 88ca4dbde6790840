"""In which order the Triton kernels' programs take a mask's blocks, and the tensors that say so."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_accel.masks.block_lists import BlockLists
from dit_accel.masks.block_mask import BlockMask


@dataclass(frozen=True, eq=False)
class LaunchOrder:
    """In which order programs take query blocks.

    Long rows (text attends everything) of all heads go first, so that none is left running alone at the end.
    Lengths are compared by powers of two: rows of similar length keep their order and share cached keys.

    Attributes:
        rows: head * num_rows + row, in the order of programs: int32 (B, heads * num_rows), B being 1 where
            all samples share their groups, else the batch.
        groups: mask group of each head, int32 (B, heads).
    """

    rows: torch.Tensor
    groups: torch.Tensor

    @classmethod
    def of(cls, mask: BlockMask, batch: int, heads: int) -> LaunchOrder:
        groups = mask.group_of_heads(batch, heads)
        return cls(longest_first(mask.full.count + mask.partial.count, groups), groups)


def longest_first(count: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """`LaunchOrder.rows` for lists of these lengths, (G, R)."""
    octave = (count + 1).double().log2().floor()
    return octave[groups.long()].flatten(1).argsort(dim=1, descending=True, stable=True).int()


def mask_arguments(mask: BlockMask, batch: int, heads: int) -> tuple[torch.Tensor, ...]:
    """The tensors by which the kernels know a mask, in the order of their arguments."""
    order = mask.derived(LaunchOrder, lambda: LaunchOrder.of(mask, batch, heads), batch, heads)
    return _arguments(order, mask.full, mask.partial, mask)


@dataclass(frozen=True, eq=False)
class KeyOrder:
    """Which query blocks list a key block, and in which order programs take key blocks.

    Attributes:
        full, partial: the transposed lists, of (G, num_cols) rows.
        rows, groups: as of `LaunchOrder`, of key blocks.
    """

    full: BlockLists
    partial: BlockLists
    rows: torch.Tensor
    groups: torch.Tensor

    @classmethod
    def of(cls, mask: BlockMask, batch: int, heads: int) -> KeyOrder:
        groups = mask.group_of_heads(batch, heads)
        full, partial = mask.transposed()
        return cls(full, partial, longest_first(full.count + partial.count, groups), groups)


def transposed_arguments(mask: BlockMask, batch: int, heads: int) -> tuple[torch.Tensor, ...]:
    """As `mask_arguments`, for dK and dV."""
    order = mask.derived(KeyOrder, lambda: KeyOrder.of(mask, batch, heads), batch, heads)
    return _arguments(order, order.full, order.partial, mask)


def _arguments(
    order: LaunchOrder | KeyOrder, full: BlockLists, partial: BlockLists, mask: BlockMask
) -> tuple[torch.Tensor, ...]:
    return (
        order.rows, order.groups, full.start, full.count, full.index,
        partial.start, partial.count, partial.index, partial.tiles, mask.tiles.view(torch.int32),
    )  # fmt: skip
