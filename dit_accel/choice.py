"""Attention of layers whose heads choose in each call the order in which they see their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .blockmask import BlockMask
from .kernels import block_sparse_attention
from .layout import TokenLayout
from .mixture import join_heads
from .patterns import Pattern, SparseVideoGen


class Sample(NamedTuple):
    """What heads choose by in one call: queries at positions int64 (n,), and their masks, bool (2, n, S)."""

    at: torch.Tensor
    masks: torch.Tensor


@dataclass(frozen=True, eq=False)
class HeadChoice:
    """A layer of spatial and temporal heads: a band of tokens in an order that each head chooses by content.

    One mask serves both kinds of head, and one kernel call all heads: q, k and v of every head are gathered
    into its order, and the output back.

    Attributes:
        pattern: how heads choose.
        layout: of this layer.
        mask: of every head in its own order.
        chooses: bool (H,), which heads do; the others keep the transformer's order.
        places: int64 (3, S), where a head sees each position of the transformer's order: one that does not
            choose, a spatial and a temporal one.
        order: int64 (3, S), the inverse: the position that stands at each place.
    """

    pattern: SparseVideoGen
    layout: TokenLayout
    mask: BlockMask
    chooses: torch.Tensor
    places: torch.Tensor
    order: torch.Tensor

    @classmethod
    def of(
        cls,
        heads: Sequence[Pattern],
        masks: Mapping[Pattern, BlockMask],
        layout: TokenLayout,
        permutation: torch.Tensor,
    ) -> HeadChoice:
        """For a layer with these patterns, exactly one of them a `SparseVideoGen`.

        Args:
            heads: the pattern of each head.
            masks: of each pattern, that of the `SparseVideoGen` in the order of its heads.
            layout: of this layer.
            permutation: the visual tokens in the transformer's order, int64 (V,).

        Raises:
            ValueError: a layout that does not suit the pattern.
        """
        (pattern,) = {p for p in heads if isinstance(p, SparseVideoGen)}
        pattern.coarse_reach(layout)
        device, places = masks[pattern].device, torch.arange(layout.seq_len).repeat(3, 1)
        places[1:, : layout.visual_len] = pattern.places(layout)[:, permutation]
        return cls(
            pattern=pattern,
            layout=layout,
            mask=join_heads({p: replace(masks[p], order=None, cache={}) for p in heads}, heads),
            chooses=torch.tensor([p == pattern for p in heads], device=device),
            places=places.to(device),
            order=torch.argsort(places).to(device),
        )

    @property
    def density(self) -> float:
        """The same whatever heads choose."""
        return self.mask.density

    @property
    def block_density(self) -> float:
        """The same whatever heads choose."""
        return self.mask.block_density

    def sample(self, step: int) -> Sample:
        """What heads choose by at a sampler step; without a device synchronisation."""
        visual = self.layout.visual_len
        spatial_order, places = self.order[1], self.places[1:, :visual]
        at = spatial_order[self.pattern.sampled(self.layout, step).to(spatial_order.device)]
        masks = self.pattern.coarse_masks(self.layout, places, at)
        return Sample(at, F.pad(masks, (0, self.layout.seq_len - visual), value=True))

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sample: Sample,
        text_valid: torch.Tensor | None = None,
        backend: str = "auto",
        scale: float | None = None,
        temporal: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention's output, like q, and which heads were temporal, bool (B, H).

        q, k, v (B, H, S, D) are in the transformer's order, visual tokens first; `temporal` is what heads
        have chosen, where they have; the others are those of `block_sparse_attention`, where errors are
        listed.
        """
        hidden = None if text_valid is None else self.layout.padding(text_valid)
        if temporal is None:
            temporal = self.pattern.are_temporal(q, k, v, *sample, hidden) & self.chooses
        kind = self.chooses + temporal.long()
        q, k, v = (_lay_out(x, self.order[kind]) for x in (q, k, v))
        out = block_sparse_attention(q, k, v, self.mask, text_valid=text_valid, backend=backend, scale=scale)
        return _lay_out(out, self.places[kind]), temporal

    def temporal_share(self, temporal: torch.Tensor) -> float:
        """The share of temporal heads among those that choose, from what `attend` returned."""
        return float(temporal[:, self.chooses].double().mean())


def _lay_out(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Row `index[b, h, s]` of each head of x (B, H, S, D); whole rows of tokens, which gathers fastest."""
    batch, heads, length, dim = x.shape
    sample, head = (torch.arange(n, device=x.device) for n in (batch, heads))
    row = (sample[:, None, None] * length + index) * heads + head[:, None]
    tokens = x.transpose(1, 2).reshape(-1, dim)
    chosen = tokens.index_select(0, row.transpose(1, 2).reshape(-1))
    return chosen.view(batch, length, heads, dim).transpose(1, 2)
