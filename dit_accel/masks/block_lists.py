"""Ragged lists of block indices, a row each, with room to spare, so that a device can fill them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .tensor_checks import LONGEST, check_range, check_tensor


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Ragged lists of block indices: row (g, r) is `index[start[g, r] : start[g, r] + count[g, r]]`.

    Rows lie one after another and never overlap; between them there may be room to spare, whose entries are
    in range but belong to no row.

    Attributes:
        start, count: int32 (G, R), of every row of every group.
        index: int32 (n,), the blocks.
        tile: int32 (n,), which tile of bits each block has, or None where blocks need none.
    """

    start: torch.Tensor
    count: torch.Tensor
    index: torch.Tensor
    tile: torch.Tensor | None = None

    @classmethod
    def packed(cls, chosen: torch.Tensor, tile: torch.Tensor | None = None) -> BlockLists:
        """Lists of the True entries of `chosen` (G, R, C) without spare room; `tile` has one for each."""
        count = chosen.sum(-1, dtype=torch.int32)
        return cls(_starts(count), count, chosen.nonzero()[:, 2].int(), tile)

    @classmethod
    def of_pairs(
        cls, row: torch.Tensor, block: torch.Tensor, rows: int, tile: torch.Tensor | None = None
    ) -> BlockLists:
        """Lists of one group from pairs sorted by row, int64 (n,) each; `tile` has one for each."""
        count = torch.bincount(row, minlength=rows).int()[None]
        return cls(_starts(count), count, block.int(), tile)

    @classmethod
    def with_room(
        cls, chosen: torch.Tensor, blocks: torch.Tensor, tile: torch.Tensor | None = None
    ) -> BlockLists:
        """Lists with room for all entries in every row, made without asking the device how many there are.

        Args:
            chosen: bool (G, R, C).
            blocks: the block that each of the C columns stands for, int32 (C,).
            tile: of every entry, int32 (R, C), or None.
        """
        groups, rows, columns = chosen.shape
        place = torch.arange(columns, dtype=torch.int32, device=chosen.device)
        listed = torch.where(chosen, place, columns).sort(-1).values.clamp(max=columns - 1).long()
        start = torch.arange(groups * rows, dtype=torch.int32, device=chosen.device) * columns
        return cls(
            start.view(groups, rows),
            chosen.sum(-1, dtype=torch.int32),
            blocks[listed].flatten(),
            None if tile is None else tile.expand(chosen.shape).gather(2, listed).flatten(),
        )

    @classmethod
    def joined(cls, parts: Sequence[BlockLists], first_tiles: Sequence[int]) -> BlockLists:
        """The groups of all parts, one after another; tiles of each part count from its `first_tiles`."""
        first = [sum(p.index.numel() for p in parts[:i]) for i in range(len(parts))]
        tiles = [p.tile + at for p, at in zip(parts, first_tiles, strict=True) if p.tile is not None]
        return cls(
            torch.cat([p.start + at for p, at in zip(parts, first, strict=True)]),
            torch.cat([p.count for p in parts]),
            torch.cat([p.index for p in parts]),
            torch.cat(tiles) if tiles else None,
        )

    @property
    def tiles(self) -> torch.Tensor:
        """`tile` of lists that have it.

        Raises:
            ValueError: lists of blocks without tiles.
        """
        if self.tile is None:
            raise ValueError("these blocks are full: they have no `tile`")
        return self.tile

    @property
    def listed(self) -> int:
        """Number of blocks in all rows."""
        return int(self.count.sum())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All there are, by name."""
        names = ("start", "count", "index", "tile")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to(self, device: torch.device) -> BlockLists:
        return BlockLists(**{name: x.to(device) for name, x in self.tensors().items()})

    def row(self, group: int, row: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The blocks of one row and their tiles, int32 (m,) each."""
        first = int(self.start[group, row])
        listed = slice(first, first + int(self.count[group, row]))
        return self.index[listed], None if self.tile is None else self.tile[listed]

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every entry of `index` its row, counted through all groups, int64 (n,), and if it is listed.

        Entries that are not listed have some row.
        """
        start, count = self.start.flatten(), self.count.flatten()
        place = torch.arange(self.index.numel(), dtype=torch.int32, device=self.index.device)
        row = (torch.searchsorted(start, place, right=True) - 1).clamp(min=0)
        offset = place - start[row]
        return row, (offset >= 0) & (offset < count[row])

    def entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row of every listed block, counted through all groups, and where in `index` it is: int64 (m,) each.

        In the order of the rows; asks the device how many there are.
        """
        row, listed = self.places()
        where = listed.nonzero()[:, 0]
        return row[where], where

    def transposed(self, columns: int) -> BlockLists:
        """Per group and column the rows that list it, in their order: lists of (G, columns) rows."""
        groups, rows = self.start.shape
        row, listed = self.places()
        column = torch.where(listed, row // rows * columns + self.index, groups * columns)
        order = torch.argsort(column, stable=True)
        count = torch.zeros(groups * columns + 1, dtype=torch.int32, device=column.device)
        count.scatter_add_(0, column, torch.ones_like(self.index))
        count = count[:-1].view(groups, columns)
        tile = None if self.tile is None else self.tile[order]
        return BlockLists(_starts(count), count, (row % rows)[order].int(), tile)

    # -- checks ----------

    def check_form(self, name: str, groups: int, rows: int) -> None:
        """Raise ValueError unless dtypes and shapes are those of `groups` of `rows`; reads no contents."""
        for field, x in self.tensors().items():
            shape = (groups, rows) if field in ("start", "count") else (self.index.numel(),)
            check_tensor(f"{name}.{field}", x, torch.int32, shape)
        if self.index.numel() > LONGEST:
            raise ValueError(f"`{name}.index` has at most {LONGEST} entries, got {self.index.numel()}")

    def check_contents(self, name: str, columns: int, tiles: int) -> None:
        """Raise ValueError unless rows lie in order inside the lists, and blocks and tiles in their range."""
        start, count = self.start.flatten().long(), self.count.flatten().long()
        stop = torch.cat([start[1:], start.new_tensor([self.index.numel()])])
        if start.numel() and (
            int(start[0]) < 0 or int(count.min()) < 0 or bool((start + count > stop).any())
        ):
            raise ValueError(
                f"rows of `{name}` must lie one after another inside its {self.index.numel()} entries, "
                "without overlap; at least one does not"
            )
        check_range(f"{name}.index", self.index, columns)
        if self.tile is not None:
            check_range(f"{name}.tile", self.tile, tiles)


def _starts(count: torch.Tensor) -> torch.Tensor:
    """Where rows of these lengths (G, R) start when packed: int32."""
    stop = count.flatten().cumsum(0)
    return (stop - count.flatten()).int().view(count.shape)
