"""Attention of heads that each have a mask in a token order of its own, known before the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_accel.kernels import block_sparse_attention
from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.per_head import join_heads

from .call import AttentionCall, LayerAttention
from .tail_densities import mask_densities


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Where the tokens of some heads stand among the rows of q, k and v, all tokens of all heads.

    One index serves q, k and v, of every sample; gathering by it chooses the heads, puts each into its order
    and leaves whole rows of a head's channels together, in one pass over memory.

    Attributes:
        gather: (S * h,), the row token * every + head of q, k, v at each place of each of h heads; int32, of
            more rows than that counts int64.
        count: h.
        every: number of all heads.
    """

    gather: torch.Tensor
    count: int
    every: int

    @classmethod
    def of(cls, orders: torch.Tensor, heads: Sequence[int], every: int) -> HeadRows:
        """Of heads among `every` head, with the token of the call at each place, int64 (h, S)."""
        chosen = torch.tensor(list(heads), dtype=torch.int64, device=orders.device)
        rows = (orders * every + chosen[:, None]).T.flatten()
        return cls(rows.int() if orders.shape[1] * every < 2**31 else rows, len(chosen), every)

    @property
    def tokens(self) -> torch.Tensor:
        """The token of the call at each place, int64 (h, S)."""
        return self.gather.long().unflatten(0, (-1, self.count)).T // self.every

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, H, S, D) of calls in the orders of these heads: (B, h, S, D)."""
        rows = x.transpose(1, 2).reshape(x.shape[0], -1, x.shape[3])
        return rows.index_select(1, self.gather).unflatten(1, (-1, self.count)).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class MaskedHeads:
    """Heads that one kernel call computes.

    Attributes:
        mask: of each of them, in its own order.
        rows: where their tokens stand.
        tail: as in `AttentionCall`.
    """

    mask: BlockMask
    rows: HeadRows
    tail: str | None


@dataclass(frozen=True, eq=False)
class HeadMasked(LayerAttention):
    """Attention in which every head has a mask and a token order of its own, and a tail or none.

    One gather of q, k and v each, one kernel call on a mask per head, and one gather of the output. Where
    some heads have a tail and others none, these are two calls.

    Attributes:
        parts: heads with a tail and without one.
        back: from the parts' outputs: the place of each token of each head.
        slots: int64 (H,), where among the heads of the parts each head is.
        calls: the model's token at each place of the order of calls, int64 (S,) on the CPU.
    """

    parts: tuple[MaskedHeads, ...]
    back: HeadRows
    slots: torch.Tensor
    calls: torch.Tensor

    @classmethod
    def of(cls, masks: Sequence[BlockMask], tails: Sequence[str | None], calls: torch.Tensor) -> HeadMasked:
        """Of a layer with these heads.

        Args:
            masks: of each head, of one group, in any order of the tokens that are the same for keys and
                queries.
            tails: of each head.
            calls: the model's token at each place of the order of calls, int64 (S,).
        """
        length, device, place = masks[0].seq_len, masks[0].device, torch.argsort(calls)
        model = torch.arange(length, device="cpu")
        orders = {id(m): place[model if m.order is None else m.order.cpu()] for m in masks}
        parts, slots, back = [], [], []
        for tail in dict.fromkeys(tails):
            heads = [head for head, own in enumerate(tails) if own == tail]
            joined = join_heads(
                {id(masks[h]): replace(masks[h], order=None, key_order=None).trusted() for h in heads},
                [id(masks[h]) for h in heads],
            )
            of_heads = torch.stack([orders[id(masks[h])] for h in heads])
            rows = HeadRows.of(of_heads.to(device), heads, len(masks))
            parts.append(MaskedHeads(joined, rows, tail))
            slots += heads
            back.append(torch.argsort(of_heads))
        slot = torch.argsort(torch.tensor(slots, dtype=torch.int64, device="cpu"))
        into = HeadRows.of(torch.cat(back)[slot].to(device), slot.tolist(), len(masks))
        return cls(tuple(parts), into, slot.to(device), calls.cpu())

    def _mean(self, values: Sequence[float]) -> float:
        total = sum(part.rows.count for part in self.parts)
        return sum(value * part.rows.count / total for value, part in zip(values, self.parts, strict=True))

    @property
    def mask(self) -> BlockMask | None:
        """That of all heads, each in its own order, where one kernel call computes them."""
        return self.parts[0].mask if len(self.parts) == 1 else None

    @property
    def density(self) -> float:
        return self._mean([mask_densities(part.mask, part.tail)[0] for part in self.parts])

    @property
    def block_density(self) -> float:
        return self._mean([mask_densities(part.mask, part.tail)[1] for part in self.parts])

    @property
    def nbytes(self) -> int:
        own = sum(part.mask.nbytes + part.rows.gather.nbytes for part in self.parts)
        return own + self.back.gather.nbytes + self.slots.nbytes

    def model_orders(self) -> list[torch.Tensor]:
        distinct = torch.cat([part.rows.tokens.cpu() for part in self.parts]).unique(dim=0)
        return [self.calls[order] for order in distinct]

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        return self._leave([self._attend(part, call) for part in self.parts])

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [self._attend(part, call, return_lse=True) for part in self.parts]
        own = [
            lse.gather(2, torch.argsort(part.rows.tokens).expand_as(lse))
            for part, (_, lse) in zip(self.parts, pairs, strict=True)
        ]
        return self._leave([out for out, _ in pairs]), torch.cat(own, 1)[:, self.slots]

    def _leave(self, outs: list[torch.Tensor]) -> torch.Tensor:
        """The outputs of the parts (B, h, S, D) in the order of calls: (B, H, S, D)."""
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
        return self.back.enter(out)

    def _attend(self, part: MaskedHeads, call: AttentionCall, return_lse: bool = False) -> Any:
        """The heads of a part, in their own orders."""
        return block_sparse_attention(
            *(part.rows.enter(x) for x in (call.q, call.k, call.v)),
            part.mask,
            scale=call.scale,
            text_valid=call.text_valid,
            return_lse=return_lse,
            backend=call.backend,
            quantization=call.quantization,
            tail=part.tail or call.tail,
        )
