"""Block-sparse attention under a mask that is known before the call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_accel.kernels import block_sparse_attention
from dit_accel.masks.block_mask import BlockMask

from .arrangement import Arrangement
from .call import AttentionCall, LayerAttention


@dataclass(frozen=True, eq=False)
class Masked(LayerAttention):
    """Attention under a `BlockMask`.

    Attributes:
        mask: in an order of its own.
        arrangement: from the order of calls to that of the mask; None where they are the same.
        keys: the same of the keys, where they are other tokens; None: they are the same.
        pv_threshold: as of `dit_accel.kernels.block_sparse_attention`.
    """

    mask: BlockMask
    arrangement: Arrangement | None = None
    pv_threshold: float | None = None
    keys: Arrangement | None = None

    def model_orders(self) -> list[torch.Tensor]:
        if self.mask.order is None:
            return [torch.arange(self.mask.seq_len, device="cpu")]
        return [self.mask.order.cpu()]

    def enter(self, call: AttentionCall) -> AttentionCall:
        """The call with its tokens in the order of the mask."""
        queries, keys = self.arrangement, self.keys or self.arrangement
        if keys is None:
            return call
        q = call.q if queries is None else queries.enter(call.q)
        return replace(call, q=q, k=keys.enter(call.k), v=keys.enter(call.v))

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, H, S, D) of the mask's order, in that of calls."""
        return x if self.arrangement is None else self.arrangement.leave(x)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        out = self._attend(call)
        return out if self.arrangement is None else self.arrangement.leave(out)

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self._attend(call, return_lse=True)
        if self.arrangement is None:
            return out, lse
        return self.arrangement.leave(out), self.arrangement.leave(lse[..., None]).squeeze(-1)

    def _attend(self, call: AttentionCall, return_lse: bool = False) -> Any:
        """In the order of the mask."""
        call = self.enter(call)
        return block_sparse_attention(
            call.q,
            call.k,
            call.v,
            self.mask,
            scale=call.scale,
            text_valid=call.text_valid,
            return_lse=return_lse,
            backend=call.backend,
            quantization=call.quantization,
            tail=call.tail,
            pv_threshold=self.pv_threshold,
        )

    def of_heads(self, call: AttentionCall, heads: list[int]) -> torch.Tensor:
        if self.mask.head_groups is not None:
            return super().of_heads(call, heads)
        return self(call.of_heads(heads))
