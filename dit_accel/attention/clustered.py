"""Attention between clusters of queries and of keys, which are found anew in each call from the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dit_accel.masks.layout import TokenLayout

from . import online
from .arrangement import call_order
from .block_grid import BlockGrid
from .call import AttentionCall, LayerAttention
from .head_permuted import HeadPermuted
from .kmeans import Clusters, kmeans
from .layer_masks import LayerMasks

if TYPE_CHECKING:
    from dit_accel.masks.block_mask import BlockMask
    from dit_accel.patterns import Clustered


@dataclass(frozen=True, eq=False)
class ClusterRouted(LayerAttention):
    """Attention to the clusters of keys that a pattern chooses for each cluster of queries.

    Heads see their visual tokens cluster by cluster, then anchor and text tokens. Blocks of the kernel that a
    chosen pair of clusters touches are computed whole.

    Attributes:
        pattern: chooses.
        grid: blocks of the kernel, of tokens in any order.
        model: the model's token at each place of calls, int64 (S,) on the device.
        first: where in a call the visual tokens are from which queries and keys start, int64 (n,) each.
        rest: where anchor and text tokens are, int64 (m,).
    """

    pattern: Clustered
    grid: BlockGrid
    model: torch.Tensor
    first: tuple[torch.Tensor, torch.Tensor]
    rest: torch.Tensor
    mask = None

    @classmethod
    def of(cls, pattern: Clustered, masks: LayerMasks) -> ClusterRouted:
        """Of a layer with this geometry."""
        return cls.made(pattern, masks.layout, masks.block_size, masks.places, masks.device)

    @classmethod
    def made(
        cls,
        pattern: Clustered,
        layout: TokenLayout,
        block_size: tuple[int, int],
        places: torch.Tensor | None,
        device: torch.device | str,
    ) -> ClusterRouted:
        """`places` as for `call_order`."""
        order = call_order(layout, places)
        first = (torch.argsort(order)[tokens] for tokens in pattern.drawn(layout))
        return cls(
            pattern,
            BlockGrid.of(layout, block_size).to(device),
            order.to(device),
            tuple(at.to(device) for at in first),
            layout.text_last[layout.visual_len :].to(device),
        )

    @property
    def density(self) -> float:
        """What the pattern aims at; what calls computed is told in their notes."""
        return self.pattern.density(self.grid.layout)

    @property
    def block_density(self) -> float:
        return self.density

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        return self.resolved(call)(call)

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        return self.resolved(call).with_lse(call)

    def resolved(self, call: AttentionCall) -> HeadPermuted:
        visual = call.layout.visual_slice
        found = self._clusters(call.at_usual_scale())
        queries, keys = (self._order(one, visual.start) for one in found)
        mask = self.block_mask(found, (self.model[queries], self.model[keys]))
        online.tell(call, mask)
        return HeadPermuted(mask, queries, keys)

    def block_mask(self, found: tuple[Clusters, Clusters], orders: tuple[torch.Tensor, ...]) -> BlockMask:
        """The mask of clusters of queries and keys that stand in these orders of the model's tokens."""
        (queries, keys), (rows, columns) = found, self.grid.chosen
        chosen = self.pattern.choose(queries.centroids, keys.centroids, keys.sizes)
        touched = _touched(queries, rows, self.grid.size[0]) @ chosen.float()
        blocks = touched.clamp(max=1) @ _touched(keys, columns, self.grid.size[1]).mT
        return self.grid.mask(blocks > 0, orders=orders)

    def _clusters(self, call: AttentionCall) -> tuple[Clusters, Clusters]:
        """Of queries and keys, from the previous executed step's centroids of the layer if it has any."""
        key, visual = (*call.q.shape, call.layout), call.layout.visual_slice
        before = None if call.memory is None else call.memory.recall(key)
        iterations = self.pattern.iterations[before is not None]
        start = before or (call.q[:, :, self.first[0]].detach(), call.k[:, :, self.first[1]].detach())
        found = tuple(
            kmeans(x[:, :, visual], own, iterations) for x, own in zip((call.q, call.k), start, strict=True)
        )
        if call.memory is not None:
            call.memory.keep(tuple(one.centroids for one in found), key)
        queries, keys = found
        return queries, keys

    def _order(self, found: Clusters, first: int) -> torch.Tensor:
        """The token of the call at each place of every head: int64 (B, H, S)."""
        visual = found.labels.argsort(dim=-1, stable=True) + first
        return torch.cat([visual, self.rest.expand(*visual.shape[:2], -1)], -1)


def _touched(found: Clusters, blocks: int, size: int) -> torch.Tensor:
    """Which clusters stand in which of the first blocks, tokens being in the order of clusters.

    Returns:
        0 and 1, fp32 (B, H, blocks, clusters).
    """
    stop = found.sizes.cumsum(-1)[:, :, None]
    start = stop - found.sizes[:, :, None]
    at = torch.arange(blocks, device=stop.device)[:, None] * size
    return ((start < at + size) & (stop > at) & (stop > start)).float()
