"""Which queries attend to any key at all, where padded text is told only at the call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_accel.masks.block_mask import BlockMask

from .problem import Lengths


@dataclass(frozen=True, eq=False)
class Attending:
    """What a mask says of each query.

    Attributes:
        others: whether a query attends to any key but text, bool (heads or 1, seq_len), where masks differ by
            sample (batch, heads, seq_len).
        first_text: the first text token that it attends to, `kv_len` if none, int32 of that shape.
        text: where text tokens are.
    """

    others: torch.Tensor
    first_text: torch.Tensor
    text: tuple[int, int]

    @classmethod
    def of(cls, mask: BlockMask) -> Attending:
        (bq, bk), (start, stop), device = mask.block_size, mask.text, mask.device
        rows = mask.num_groups * mask.num_rows
        others = torch.zeros(rows, bq, dtype=torch.int32, device=device)
        first = torch.full((rows, bq), mask.kv_len, dtype=torch.int32, device=device)
        others[mask.full.entries()[0]] = 1
        row, where = mask.partial.entries()
        block, tile, bits = mask.partial.index[where], mask.partial.tiles[where].long(), mask.unpacked_tiles()
        has_text = (block * bk < stop) & (block * bk + bk > start)
        others.index_add_(0, row[~has_text], bits.any(-1)[tile[~has_text]].int())
        for one in block[has_text].unique():  # few, since text is short
            here = block == one
            key = (one * bk + torch.arange(bk, device=device)).int()
            attended, is_text = bits[tile[here]], (key >= start) & (key < stop)
            others.index_add_(0, row[here], (attended & ~is_text).any(-1).int())
            earliest = torch.where(attended & is_text, key, mask.kv_len).amin(-1)
            first[row[here]] = torch.minimum(first[row[here]], earliest)
        groups = slice(None) if mask.head_groups is None else mask.head_groups.long()
        by_head = (x.view(mask.num_groups, -1)[groups][..., : mask.seq_len] for x in (others > 0, first))
        return cls(*by_head, mask.text)

    def rows(self, text_valid: Lengths) -> torch.Tensor:
        """The queries that attend to something: bool, as `others`, or (batch, heads or 1, seq_len)."""
        start, stop = self.text
        if text_valid is None:
            return self.others | (self.first_text < stop)
        return self.others | (self.first_text < start + text_valid.view(-1, 1, 1))
