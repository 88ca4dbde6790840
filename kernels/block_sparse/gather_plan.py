"""The plan of `gather` for a mask, made once: chunks of query blocks and their lists of key blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from dit_accel.blockmask import BlockMask

_CHUNK_BYTES_CPU = 3 << 20  # scores and gathered keys or values of one chunk
_CHUNK_BYTES_ACCELERATOR = 256 << 20
_PADDING = 0.06  # rows of a chunk may be shorter than the longest by this share of it
_KEYS_BYTES = 64 << 20  # lists of key blocks beyond this are made when they are needed


class Round(NamedTuple):
    """n heads of a chunk, counted through batch and heads, in blocks of all of them.

    `first_key` is where their key blocks start: int32 (n, 1). `query_blocks` are their query blocks, int64
    (n * r,), and `keys` the listed key blocks, int32 (n * r * l,), or None where lists would take too much.
    """

    first_key: torch.Tensor
    query_blocks: torch.Tensor
    keys: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Chunk:
    """Query blocks computed together; their lists of key blocks are padded to one length.

    `rows` are query blocks: int64 (r,). Each round computes some heads.
    `cols` are key blocks, full ones first: int32 (r, l). `tiles` is the tile of every key block from
    `first_masked` on: int32 (r, l - first_masked), T meaning all attended and T + 1 (padding) nothing.
    """

    rounds: tuple[Round, ...]
    rows: torch.Tensor
    cols: torch.Tensor
    tiles: torch.Tensor
    first_masked: int
    touches_text: bool
    may_attend_nothing: bool


def plan(mask: BlockMask, batch: int, heads: int, dim: int, dtype: torch.dtype) -> list[Chunk]:
    """Chunks that cover every query block that has keys, for all samples and heads; kept in `mask.cache`."""
    on_cpu = mask.device.type == "cpu"
    name = ("gather", batch, heads, dim, dtype)
    if name not in mask.cache:
        limit = _CHUNK_BYTES_CPU if on_cpu else _CHUNK_BYTES_ACCELERATOR
        limit_in_blocks = limit // (mask.block_size[1] * (mask.block_size[0] + dim) * dtype.itemsize)
        lists, group_of_head = _BlockLists(mask), mask.group_of_heads(heads).to(mask.device)
        listed = len(lists.cols) // mask.num_groups * heads * batch * 4 <= _KEYS_BYTES
        chunks = []
        for group in range(mask.num_groups):
            in_group = (group_of_head == group).nonzero()[:, 0]
            places = (torch.arange(batch, device=mask.device)[:, None] * heads + in_group).view(-1).int()
            for rows in lists.similar_rows(group, limit_in_blocks):
                chunk = lists.chunk(group, rows)
                at_once = max(1, limit_in_blocks // chunk.cols.numel())
                rounds = (_round(mask, chunk, heads, listed) for heads in places[:, None].split(at_once))
                chunks.append(replace(chunk, rounds=tuple(rounds)))
        mask.cache[name] = chunks
    return mask.cache[name]


def _round(mask: BlockMask, chunk: Chunk, heads: torch.Tensor, listed: bool) -> Round:
    first_key = heads * mask.num_cols
    query_blocks = (heads * mask.num_rows + chunk.rows).view(-1)
    return Round(first_key, query_blocks, (first_key + chunk.cols.view(-1)).view(-1) if listed else None)


class _BlockLists:
    """Key blocks (full ones first) and their tiles for every query block, rows counted through all groups."""

    def __init__(self, mask: BlockMask):
        self.mask = mask
        in_row = mask.block_rows()
        count = mask.num_groups * mask.num_rows
        self.num_full = torch.bincount(in_row[0], minlength=count)
        self.length = self.num_full + torch.bincount(in_row[1], minlength=count)
        self.start = self.length.cumsum(0) - self.length
        order = torch.argsort(torch.cat(in_row), stable=True)
        self.all_attended, self.none_attended = mask.tiles.shape[0], mask.tiles.shape[0] + 1
        self.cols = torch.cat([mask.full_idx, mask.part_idx])[order]
        self.tiles = torch.cat([torch.full_like(mask.full_idx, self.all_attended), mask.part_tile])[order]
        self.attends = packed_tiles(mask).any(-1).T  # (T + 2, bq)
        query = torch.arange(mask.num_rows * mask.block_size[0], device=mask.device)
        self.outside = (query >= mask.seq_len).view(mask.num_rows, -1)

    def similar_rows(self, group: int, limit: int) -> Iterator[torch.Tensor]:
        """Query blocks of a group, longest first, in runs of similar length of at most `limit` key blocks."""
        rows = slice(group * self.mask.num_rows, (group + 1) * self.mask.num_rows)
        length, order = self.length[rows].cpu().sort(descending=True, stable=True)
        length = length.tolist()
        at, end = 0, sum(n > 0 for n in length)
        while at < end:
            stop, most = at + 1, at + limit // length[at]
            while stop < min(end, most) and length[stop] >= length[at] * (1 - _PADDING):
                stop += 1
            yield order[at:stop].sort().values.to(self.mask.device)
            at = stop

    def chunk(self, group: int, rows: torch.Tensor) -> Chunk:
        """The chunk of some query blocks of a group, without its heads."""
        (text_start, text_stop), bk = self.mask.text, self.mask.block_size[1]
        row = rows + group * self.mask.num_rows
        length = self.length[row][:, None]
        column = torch.arange(int(length.max()), device=row.device)
        listed, where = column < length, self.start[row][:, None] + column
        where = where.clamp(max=len(self.cols) - 1)
        cols = torch.where(listed, self.cols[where], 0)
        tiles = torch.where(listed, self.tiles[where], self.none_attended)
        first_masked = int(self.num_full[row].min())
        in_text = listed & (cols * bk < text_stop) & (cols * bk + bk > text_start)
        attends = self.attends[tiles.long()].any(1) | self.outside[rows]
        return Chunk(
            rounds=(),
            rows=rows,
            cols=cols,
            tiles=tiles[:, first_masked:].contiguous(),
            first_masked=first_masked,
            touches_text=bool(in_text.any()),
            may_attend_nothing=not bool(attends.all()),
        )


def packed_tiles(mask: BlockMask) -> torch.Tensor:
    """The mask's tiles, then one that attends all and one that attends nothing: uint8 (bq, T + 2, bk / 8)."""
    shape = (1, *mask.tiles.shape[1:])
    tiles = torch.cat([mask.tiles, mask.tiles.new_full(shape, 255), mask.tiles.new_zeros(shape)])
    return tiles.transpose(0, 1).contiguous()
