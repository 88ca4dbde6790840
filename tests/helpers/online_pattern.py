"""An online pattern as a contributor would write it: for each block of queries, the closest key blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dit_accel import BlockMask
from dit_accel.patterns.base import OnlinePattern


@dataclass(frozen=True)
class TopBlocks(OnlinePattern):
    """A share of the key blocks by mean query times mean key; blocks with text attend and are attended."""

    share: float = 0.4

    def density(self, layout):
        return self.share

    def select(self, q, k, layout, *, block_size=None, text_valid=None):
        (bq, bk), visual = block_size or (16, 16), layout.visual_len
        order = layout.text_last.to(q.device) if layout.text_first else None

        def means(x: torch.Tensor, size: int) -> torch.Tensor:
            x = (x if order is None else x[:, :, order])[:, :, :visual]
            return (
                F.pad(x, (0, 0, 0, -layout.seq_len % size + layout.text_len)).unflatten(2, (-1, size)).mean(3)
            )

        scores = means(q, bq) @ means(k, bk).mT
        top = scores.topk(max(1, int(self.share * scores.shape[-1])), -1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True)
        chosen[..., visual // bk :] = True
        chosen[..., visual // bq :, :] = True
        return BlockMask.from_blocks(
            chosen,
            block_size=(bq, bk),
            seq_len=layout.seq_len,
            kv_len=layout.seq_len,
            text=(visual, layout.seq_len) if layout.text_len else (0, 0),
            order=order,
            key_order=order,
        )
