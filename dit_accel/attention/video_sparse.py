"""Video sparse attention (VSA): attention between means of cubes, gated, beside that of tokens in some."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import online
from .block_scores import largest
from .call import AttentionCall, LayerAttention, LayerSizes
from .cubes import Cubes
from .layer_masks import LayerMasks
from .masked import Masked

if TYPE_CHECKING:
    from dit_accel.patterns import VideoSparse

GATE, GATE_BIAS = "to_gate_compress.weight", "to_gate_compress.bias"  # (H * D, C), (H * D,), as learned


class Coarse(NamedTuple):
    """Attention between means of cubes: its weights (B, H, C, C), and which are chosen, bool like them."""

    weights: torch.Tensor
    chosen: torch.Tensor


@dataclass(frozen=True, eq=False)
class VideoSparseAttention(LayerAttention):
    """Attention of each cube of queries to the cubes of keys that weigh most, plus the gated coarse branch.

    Without a gate in the call it is the first part alone.

    Attributes:
        pattern: says how many cubes are chosen.
        cubes: of the tokens in the order of calls.
        rows: places of a block of queries in masks.
        decided: which cubes are chosen, bool (B, H, C, C); None: each call chooses.
    """

    pattern: VideoSparse
    cubes: Cubes
    rows: int
    decided: torch.Tensor | None = None
    mask = None

    @classmethod
    def of(cls, pattern: VideoSparse, masks: LayerMasks) -> VideoSparseAttention:
        """Of a layer with this geometry; masks take the kernel's blocks of queries that divide a cube."""
        cubes = Cubes.of(masks.layout, pattern.cube, masks.places, masks.device)
        own = masks.block_size[0]
        return cls(pattern, cubes, own if cubes.size % own == 0 else cubes.size)

    @property
    def density(self) -> float:
        """What the pattern aims at; what calls computed is told in their notes."""
        return self.pattern.density(self.cubes.layout)

    @property
    def block_density(self) -> float:
        """With the places of cut cubes that hold no token."""
        blocks, count = len(self.cubes.exists) // self.cubes.size, self.cubes.count
        listed = blocks**2 - count**2 + count * self.pattern.kept(count)
        return self.cubes.block_share(listed / blocks**2)

    def pairs_beside(self, sizes: LayerSizes) -> float:
        """Those of cubes, and the gate."""
        return self.cubes.count**2 + self.cubes.layout.visual_len * sizes.width / 2

    @property
    def nbytes(self) -> int:
        own = (self.cubes.gather, self.cubes.exists, self.cubes.places, self.cubes.cube, self.cubes.order)
        return sum(x.nbytes for x in own)

    def resolved(self, call: AttentionCall) -> VideoSparseAttention:
        return replace(self, decided=self._coarse(self._by_place(call)).chosen)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        placed = self._by_place(call)
        coarse = self._coarse(placed)
        out = self.cubes.leave(self._masked(call, coarse)(placed))
        gate = call.of_input(GATE, "the gate of the coarse branch")
        if gate is None:
            return out
        means = self.cubes.means(placed.v)
        with torch.autocast(call.q.device.type, enabled=False):
            pooled = (coarse.weights @ means)[:, :, self.cubes.cube]
        visual = call.layout.visual_slice
        gated = out[:, :, visual] + (pooled * gate).to(out.dtype)
        return torch.cat([out[:, :, : visual.start], gated, out[:, :, visual.stop :]], 2)

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        if GATE in call.learned:
            return LayerAttention.with_lse(self, call)  # there is none
        placed = self._by_place(call)
        out, lse = self._masked(call, self._coarse(placed)).with_lse(placed)
        return self.cubes.leave(out), self.cubes.leave(lse[..., None]).squeeze(-1)

    def _by_place(self, call: AttentionCall) -> AttentionCall:
        q, k, v = map(self.cubes.enter, (call.q, call.k, call.v))
        return replace(call, q=q, k=k, v=v)

    def _coarse(self, placed: AttentionCall) -> Coarse:
        """Of a call by place."""
        q, k = map(self.cubes.means, (placed.q, placed.k))
        with torch.autocast(q.device.type, enabled=False):
            weights = (q * placed.factor @ k.mT).softmax(-1)
        if self.decided is not None:
            return Coarse(weights, self.decided)
        return Coarse(weights, largest(weights.detach(), self.pattern.kept(self.cubes.count)))

    def _masked(self, call: AttentionCall, coarse: Coarse) -> Masked:
        """Attention to the chosen cubes, by place; tells what it computes."""
        mask = self.cubes.mask(coarse.chosen, self.rows)
        online.tell(call, mask)
        blocks = self.cubes.every(coarse.chosen).double().mean() * self.cubes.block_share(1)
        call.notes["achieved"] = torch.stack([self.cubes.share(coarse.chosen), blocks])
        return Masked(mask)
