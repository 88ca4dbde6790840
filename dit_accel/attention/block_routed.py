"""Block-sparse attention under blocks that each call chooses, kept for some executed steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.tiles import pack_bits, unpack_bits

from . import online
from .arrangement import Arrangement
from .block_grid import BlockGrid
from .call import AttentionCall, LayerAttention
from .layer_masks import LayerMasks
from .masked import Masked

if TYPE_CHECKING:
    from dit_accel.patterns import Rectified, Routed, SparseLinear


class Choice(NamedTuple):
    """What a layer chose: bits of blocks (B, H, R, ceil(C / 8)), at how many executed steps before, and when.

    `step` is the sampler step of the latest use, whose second evaluation (Heun's method) is no step more.
    """

    blocks: torch.Tensor
    age: int
    step: int


@dataclass(frozen=True, eq=False)
class BlockRouted(LayerAttention):
    """Attention to the blocks of keys that a pattern chooses for each block of queries.

    Attributes:
        pattern: chooses.
        grid: the blocks.
        block_size: of masks, which divides theirs.
        arrangement: from the order of calls to that of the blocks; None where they are the same.
    """

    pattern: Routed | Rectified | SparseLinear
    grid: BlockGrid
    block_size: tuple[int, int]
    arrangement: Arrangement | None = None
    mask = None

    @classmethod
    def of(cls, pattern: Routed | Rectified | SparseLinear, masks: LayerMasks) -> BlockRouted:
        """Of a layer with this geometry. Masks take the kernel's blocks of queries where they divide its."""
        grid = pattern.grid(masks.layout, masks.order, masks.device)
        queries, keys = grid.size
        fitting = masks.block_size[0] if queries % masks.block_size[0] == 0 else queries
        return cls(pattern, grid, (fitting, keys), grid.from_calls(masks.places, masks.device))

    @property
    def density(self) -> float:
        """What the pattern aims at; what calls computed is told in their notes."""
        return self.pattern.density(self.grid.layout)

    @property
    def block_density(self) -> float:
        return self.density

    def resolved(self, call: AttentionCall) -> Masked:
        return Masked(self._mask(self._moved(call)), self.arrangement, self._pv_threshold)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        moved = self._moved(call)
        out = Masked(self._mask(moved), None, self._pv_threshold)(moved)
        return out if self.arrangement is None else self.arrangement.leave(out)

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        return self.resolved(call).with_lse(call)

    @property
    def _pv_threshold(self) -> float | None:
        return getattr(self.pattern, "pv_threshold", None)  # Rectified has none

    def _moved(self, call: AttentionCall) -> AttentionCall:
        """The call with its tokens in the order of the blocks."""
        if self.arrangement is None:
            return call
        q, k, v = map(self.arrangement.enter, (call.q, call.k, call.v))
        return replace(call, q=q, k=k, v=v)

    def _mask(self, call: AttentionCall) -> BlockMask:
        mask = self.grid.mask(self._chosen(call), self.block_size)
        online.tell(call, mask)
        return mask

    def _chosen(self, call: AttentionCall) -> torch.Tensor:
        """Blocks chosen at this step, or at one of the latest `refresh - 1` executed steps of the layer.

        Bool (B, H, *grid.chosen); the call's tokens stand in the order of the blocks.
        """
        refresh, key = self.pattern.refresh, (*call.q.shape, call.layout)
        if refresh == 1 or call.memory is None:
            return self.pattern.chosen(call.at_usual_scale(), self.grid)
        before: Choice | None = call.memory.recall(key)
        age = 0 if before is None else before.age + (before.step != call.step)
        if before is None or age >= refresh:
            chosen = self.pattern.chosen(call.at_usual_scale(), self.grid)
            call.memory.keep(Choice(packed(chosen), 0, call.step), key)
            return chosen
        call.memory.keep(before._replace(age=age, step=call.step), key)
        return unpacked(before.blocks, self.grid.chosen[1])


def packed(chosen: torch.Tensor) -> torch.Tensor:
    """A choice of blocks, bool (..., C), as bits (..., ceil(C / 8))."""
    return pack_bits(torch.nn.functional.pad(chosen, (0, -chosen.shape[-1] % 8)))


def unpacked(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse, bool (..., columns)."""
    return unpack_bits(bits)[..., :columns]
