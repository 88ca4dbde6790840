"""Block-sparse attention under a mask that each call chooses from its queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dit_accel.kernels import achieved_pooled_density
from dit_accel.masks.layout import TokenLayout

from .arrangement import Arrangement, call_order
from .call import AttentionCall, LayerAttention
from .layer_masks import LayerMasks
from .masked import Masked

if TYPE_CHECKING:
    from dit_accel.masks.block_mask import BlockMask
    from dit_accel.patterns import OnlinePattern


@dataclass(frozen=True, eq=False)
class Online(LayerAttention):
    """Attention under the mask that an online pattern selects, anew in every call.

    Attributes:
        pattern: selects.
        layout: of this layer.
        block_size: of the masks.
        to_model: from the order of calls to the model's own; None where they are the same.
    """

    pattern: OnlinePattern
    layout: TokenLayout
    block_size: tuple[int, int]
    to_model: Arrangement | None = None
    mask = None

    @classmethod
    def of(cls, pattern: OnlinePattern, masks: LayerMasks) -> Online:
        """Of a layer with this geometry."""
        order = call_order(masks.layout, masks.places)
        to_model = Arrangement.between(order, call_order(masks.layout), masks.device)
        return cls(pattern, masks.layout, masks.block_size, to_model)

    @property
    def density(self) -> float:
        """What the pattern aims at; the share of blocks that a call chose is told in its notes."""
        return self.pattern.density(self.layout)

    @property
    def block_density(self) -> float:
        return self.density

    def resolved(self, call: AttentionCall) -> Masked:
        own = (call.at_usual_scale().q, call.k)
        q, k = (x if self.to_model is None else self.to_model.enter(x) for x in own)
        options = {"block_size": self.block_size, "text_valid": call.text_valid}
        mask = self.pattern.select(q, k, self.layout, **options)
        tell(call, mask)
        if mask.order is None:
            return Masked(mask, self.to_model)
        order = mask.order if self.to_model is None else self.to_model.gather[mask.order]
        return Masked(mask, Arrangement(order, torch.argsort(order)))

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        return self.resolved(call)(call)

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        return self.resolved(call).with_lse(call)


def tell(call: AttentionCall, mask: BlockMask) -> None:
    """Notes what a call computes, without waiting for the device: density and block density of its mask.

    With a tail as `dit_accel.attention.tail_densities` counts.
    """
    listed = mask.full.count.sum() + mask.partial.count.sum()
    blocks = listed.double() / (mask.num_groups * mask.num_rows * mask.num_cols)
    if call.tail is not None:
        blocks = blocks + achieved_pooled_density(mask)
        mask = mask.with_whole_blocks()
    call.notes["achieved"] = torch.stack([mask.achieved_density(), blocks])
