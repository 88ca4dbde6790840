"""The chunks of query blocks that `gather` computes together, with their lists of key blocks; made once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from dit_accel.masks.block_mask import BlockMask

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


def chunks_of(mask: BlockMask, batch: int, heads: int, dim: int, dtype: torch.dtype) -> list[Chunk]:
    """Chunks that cover every query block that has keys, for all samples and heads; made once for a mask."""

    def make() -> _Chunks:
        limit = _CHUNK_BYTES_CPU if mask.device.type == "cpu" else _CHUNK_BYTES_ACCELERATOR
        limit_in_blocks = limit // (mask.block_size[1] * (mask.block_size[0] + dim) * dtype.itemsize)
        lists, group_of_plane = _Rows(mask), mask.group_of_heads(batch, heads).expand(batch, heads).flatten()
        listed = len(lists.cols) // mask.num_groups * heads * batch * 4 <= _KEYS_BYTES
        chunks = []
        for group in range(mask.num_groups):
            planes = (group_of_plane == group).nonzero().int()
            for rows in lists.similar_rows(group, limit_in_blocks):
                chunk = lists.chunk(group, rows)
                at_once = max(1, limit_in_blocks // chunk.cols.numel())
                split = planes.split(at_once) if len(planes) else ()
                rounds = (_round(mask, chunk, some, listed) for some in split)
                chunks.append(replace(chunk, rounds=tuple(rounds)))
        return _Chunks(chunks)

    return mask.derived(_Chunks, make, batch, heads, dim, dtype).chunks


@dataclass(frozen=True, eq=False)
class _Chunks:
    chunks: list[Chunk]


def _round(mask: BlockMask, chunk: Chunk, heads: torch.Tensor, listed: bool) -> Round:
    first_key = heads * mask.num_cols
    query_blocks = (heads * mask.num_rows + chunk.rows).view(-1)
    return Round(first_key, query_blocks, (first_key + chunk.cols.view(-1)).view(-1) if listed else None)


class _Rows:
    """Key blocks (full ones first) and their tiles for every query block, rows counted through all groups."""

    def __init__(self, mask: BlockMask):
        self.mask = mask
        (full_row, full_at), (row, at) = mask.full.entries(), mask.partial.entries()
        self.num_full = mask.full.count.flatten().long()
        self.length = self.num_full + mask.partial.count.flatten()
        self.start = self.length.cumsum(0) - self.length
        order = torch.argsort(torch.cat([full_row, row]), stable=True)
        self.all_attended, self.none_attended = mask.tiles.shape[0], mask.tiles.shape[0] + 1
        full = mask.full.index[full_at]
        self.cols = torch.cat([full, mask.partial.index[at]])[order]
        self.tiles = torch.cat([torch.full_like(full, self.all_attended), mask.partial.tiles[at]])[order]
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
