"""Sparse-linear attention (SLA): chosen blocks by softmax, the rest by linear attention and a projection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

from . import online
from .block_routed import BlockRouted
from .call import AttentionCall, LayerAttention, LayerSizes
from .masked import Masked

if TYPE_CHECKING:
    from dit_accel.patterns import SparseLinear

WEIGHT, BIAS = "proj_l.weight", "proj_l.bias"  # of the projection, (D, D) and (D,), among learned ones
FEATURE_MAPS = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: F.elu(x) + 1,
    "relu": torch.relu,
}
_NUMBERS_AT_ONCE = 2**26  # of the sums over blocks that are in memory at a time


class Blocks(NamedTuple):
    """What a call chose for blocks of queries: critical and marginal blocks of keys, bool (B, H, R, C)."""

    critical: torch.Tensor
    marginal: torch.Tensor


def linear_over_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (sum of k^T v) / (q . sum of k + 1e-5), over all keys: (B, H, n, D); k is 0 where it is hidden."""
    return q @ (k.mT @ v) / (q @ k.sum(2)[..., None] + 1e-5)


def linear_over_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sizes: tuple[int, int], blocks: torch.Tensor
) -> torch.Tensor:
    """q (sum of k^T v) / (q . sum of k), for each block of queries over some blocks of keys; 0 over none.

    Args:
        q, k: features (B, H, n, D), not negative.
        v: values (B, H, n, D).
        sizes: tokens of a block of queries, and of keys.
        blocks: which blocks of keys, bool (B, H, R, C).

    Returns:
        (B, H, n, D).
    """
    queries = q.shape[2]
    q, k, v = (
        F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))
        for x, size in zip((q, k, v), (sizes[0], sizes[1], sizes[1]), strict=True)
    )
    sums, totals = (k.mT @ v).flatten(3), k.sum(3)  # [B, H, C, D * D], [B, H, C, D]
    batch, heads, _, width = sums.shape
    parts = []
    at_once = max(1, _NUMBERS_AT_ONCE // (batch * heads * width))
    for own, chosen in zip(q.split(at_once, 2), blocks.to(q.dtype).split(at_once, 2), strict=True):
        upper = own @ (chosen @ sums).unflatten(3, (q.shape[4], -1))
        lower = own @ (chosen @ totals)[..., None]
        parts.append(upper / torch.where(lower > 0, lower, 1))
    return torch.cat(parts, 2).flatten(2, 3)[:, :, :queries]


@dataclass(frozen=True, eq=False)
class SparseLinearAttention(BlockRouted):
    """Attention to critical blocks, plus a learned projection of linear attention to the others, or to all.

    Without a projection in the call it is the first part alone, as before training. Queries in blocks that
    are always computed in full, those with text, have the first part alone too.

    Attributes:
        blocks: chosen by a call; None: each call chooses its own.
    """

    pattern: SparseLinear
    blocks: Blocks | None = None

    def pairs_beside(self, sizes: LayerSizes) -> float:
        """Sums of phi(k)^T v, their products with phi(q), and the projection."""
        layout, (rows, columns) = self.grid.layout, self.grid.chosen
        queries, keys = (
            min(n * size, layout.visual_len) for n, size in zip((rows, columns), self.grid.size, strict=True)
        )
        if self.pattern.form == "all":
            return sizes.head_dim * (layout.seq_len + 2 * queries) / 2
        return sizes.head_dim * (keys + 2 * queries + rows * columns) / 2

    def resolved(self, call: AttentionCall) -> LayerAttention:
        return replace(self, blocks=self._blocks(self._moved(call)))

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        call = self._moved(call)
        blocks = self._blocks(call)
        mask = self.grid.mask(blocks.critical, self.block_size)
        online.tell(call, mask)
        out = Masked(mask)(call)
        if WEIGHT in call.learned:
            own = self._projected(call, blocks.marginal)
            queries = own.shape[2]
            out = torch.cat([out[:, :, :queries] + own.to(out.dtype), out[:, :, queries:]], 2)
        return out if self.arrangement is None else self.arrangement.leave(out)

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        if WEIGHT in call.learned:
            return LayerAttention.with_lse(self, call)  # there is none
        return Masked(self._mask(self._moved(call)), self.arrangement).with_lse(call)

    def _chosen(self, call: AttentionCall) -> torch.Tensor:
        return self._blocks(call).critical

    def _blocks(self, call: AttentionCall) -> Blocks:
        """Of a call in the order of the blocks."""
        if self.blocks is not None:
            return self.blocks
        call = call.at_usual_scale()
        return self.pattern.blocks(*self.grid.visual(call.q, call.k))

    def _projected(self, call: AttentionCall, marginal: torch.Tensor) -> torch.Tensor:
        """What is added to the output of the first queries, in at least fp32: (B, H, queries, D)."""
        exact = torch.promote_types(call.q.dtype, torch.float32)
        feature_map, over_all = FEATURE_MAPS[self.pattern.feature_map], self.pattern.form == "all"
        q, k = self.grid.visual(call.q, call.k)
        k = call.k if over_all else k
        with torch.autocast(q.device.type, enabled=False):
            q, k = feature_map(q.to(exact)), feature_map(k.to(exact))
            v = call.v[:, :, : k.shape[2]].to(exact)
            if over_all:
                if call.text_valid is not None:
                    k = k.masked_fill(self.grid.padding(call.text_valid)[:, None, :, None], 0)
                out = linear_over_all(q, k, v)
            else:
                out = linear_over_blocks(q, k, v, self.grid.size, marginal)
            return F.linear(out, call.learned[WEIGHT].to(exact), call.learned[BIAS].to(exact))
