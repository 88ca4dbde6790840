"""Attention of layers whose heads choose in each call the order in which they see their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F

from dit_accel.kernels import block_sparse_attention
from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.per_head import join_heads

from .arrangement import lay_out
from .call import AttentionCall, LayerAttention

if TYPE_CHECKING:
    from dit_accel.patterns import Pattern, SparseVideoGen


class Sample(NamedTuple):
    """What heads choose by in one call: queries at positions int64 (n,), and their masks, bool (2, n, S)."""

    at: torch.Tensor
    masks: torch.Tensor


@dataclass(frozen=True, eq=False)
class HeadOrdered(LayerAttention):
    """Spatial and temporal heads: a band of tokens in an order that each head chooses by content.

    One mask serves both kinds of head, and one kernel call all heads: q, k and v of every head are gathered
    into its order, and the output back.

    Attributes:
        pattern: how heads choose.
        layout: of this layer.
        mask: of every head in its own order, as dense whatever heads choose.
        chooses: bool (H,), which heads do; the others keep the order of their masks.
        places: int64 (3, S), where a head sees each token of the call: one that does not choose, a spatial
            and a temporal one.
        order: int64 (3, S), the inverse: the token of the call at each place.
        calls: the model's token at each place of the order of calls, int64 (S,) on the CPU.
        temporal: which heads are temporal, bool (B, H), once that is decided.
    """

    pattern: SparseVideoGen
    layout: TokenLayout
    mask: BlockMask
    chooses: torch.Tensor
    places: torch.Tensor
    order: torch.Tensor
    calls: torch.Tensor
    temporal: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        pattern: SparseVideoGen,
        heads: Sequence[Pattern],
        masks: Mapping[Pattern, BlockMask],
        layout: TokenLayout,
        calls: torch.Tensor,
    ) -> HeadOrdered:
        """For a layer with these patterns.

        Args:
            pattern: the one of them by which heads choose.
            heads: the pattern of each head.
            masks: of each pattern, that of `pattern` in the order of its heads; text last in all.
            layout: of this layer.
            calls: the model's token at each place of the order of calls, int64 (S,).

        Raises:
            ValueError: a layout that does not suit the pattern.
        """
        pattern.coarse_reach(layout)
        device = masks[pattern].device
        by_mask = [layout.text_last if mask.order is None else mask.order.cpu() for mask in masks.values()]
        own = by_mask[[p == pattern for p in masks].index(False)] if len(masks) > 1 else calls
        visual, rest = layout.text_last.split([layout.visual_len, layout.seq_len - layout.visual_len])
        of_kinds = (torch.cat([visual[torch.argsort(places)], rest]) for places in pattern.places(layout))
        order = torch.stack([torch.argsort(calls)[order] for order in (own, *of_kinds)])
        return cls(
            pattern=pattern,
            layout=layout,
            mask=join_heads({p: replace(masks[p], order=None, key_order=None) for p in heads}, heads),
            chooses=torch.tensor([p == pattern for p in heads], dtype=torch.bool, device=device),
            places=torch.argsort(order).to(device),
            order=order.to(device),
            calls=calls,
        )

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.places.nbytes + self.order.nbytes

    def model_orders(self) -> list[torch.Tensor]:
        return [self.calls[self.order[kind].cpu()] for kind in (1, 2)]

    def sample(self, step: int) -> Sample:
        """What heads choose by at a sampler step; without a device synchronisation."""
        visual = self.layout.visual_slice
        places = self.places[1:, visual]
        # a spatial head's order is the model's own
        at = torch.argsort(places[0])[self.pattern.sampled(self.layout, step).to(places.device)]
        masks = self.pattern.coarse_masks(self.layout, places, at)
        around = (visual.start, self.layout.seq_len - visual.stop)
        return Sample(at + visual.start, F.pad(masks, around, value=True))

    def resolved(self, call: AttentionCall) -> HeadOrdered:
        if self.temporal is not None:
            return self
        q, k, v, hidden = call.at_usual_scale().q, call.k, call.v, call.hidden_keys()
        temporal = self.pattern.are_temporal(q, k, v, *self.sample(call.step), hidden) & self.chooses
        call.notes.update({"temporal heads": temporal, "choosing heads": self.chooses})
        return replace(self, temporal=temporal)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        kind = self._kinds(call)
        return lay_out(self._attend(call, kind), self.places[kind])

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        kind = self._kinds(call)
        out, lse = self._attend(call, kind, return_lse=True)
        places = self.places[kind]
        return lay_out(out, places), lse.gather(2, places.expand(lse.shape))

    def _kinds(self, call: AttentionCall) -> torch.Tensor:
        """The row of `order` and `places` that is each head's in this call, int64 (B, H)."""
        return self.chooses + self.resolved(call).temporal.long()

    def _attend(self, call: AttentionCall, kind: torch.Tensor, return_lse: bool = False) -> Any:
        """Every head in its own order."""
        return block_sparse_attention(
            *(lay_out(x, self.order[kind]) for x in (call.q, call.k, call.v)),
            self.mask,
            scale=call.scale,
            text_valid=call.text_valid,
            return_lse=return_lse,
            backend=call.backend,
            quantization=call.quantization,
            tail=call.tail,
        )
