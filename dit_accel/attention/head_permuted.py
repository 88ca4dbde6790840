"""Attention of heads that each see queries and keys in an order of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dit_accel.masks.block_mask import BlockMask

from .arrangement import lay_out
from .call import AttentionCall, LayerAttention
from .masked import Masked


@dataclass(frozen=True, eq=False)
class HeadPermuted(LayerAttention):
    """Attention under a mask in the orders of each head; q, k, v are gathered, and the output back.

    Attributes:
        mask: of every sample and head in its own orders.
        queries, keys: the token of the call at each place of them, int64 (B, H, S).
    """

    mask: BlockMask
    queries: torch.Tensor
    keys: torch.Tensor

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        return self.leave(Masked(self.mask)(self.enter(call)))

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = Masked(self.mask).with_lse(self.enter(call))
        return self.leave(out), lse.gather(2, torch.argsort(self.queries))

    def enter(self, call: AttentionCall) -> AttentionCall:
        """The call with its tokens in the orders of the mask."""
        q, k, v = lay_out(call.q, self.queries), lay_out(call.k, self.keys), lay_out(call.v, self.keys)
        return replace(call, q=q, k=k, v=v)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, H, S, D) of the orders of queries, in that of calls."""
        return lay_out(x, torch.argsort(self.queries))
