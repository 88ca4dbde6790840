"""Block-sparse attention that skips what earlier executed steps of a run have marked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from .block_routed import BlockRouted, packed, unpacked
from .call import AttentionCall

if TYPE_CHECKING:
    from dit_accel.patterns import Skipping


class Marks(NamedTuple):
    """What a layer has not marked: bits of blocks (B, H, R, ceil(C / 8)), after how many executed steps.

    `step` is the sampler step of the latest use, whose second evaluation (Heun's method) is no step more.
    """

    left: torch.Tensor
    age: int
    step: int


@dataclass(frozen=True, eq=False)
class SkippingAttention(BlockRouted):
    """Attention to the blocks that the earlier steps of a run have left; it judges them for the next one."""

    pattern: Skipping

    def _chosen(self, call: AttentionCall) -> torch.Tensor:
        pattern, grid, memory = self.pattern, self.grid, call.memory
        every = torch.ones((*call.q.shape[:2], *grid.chosen), dtype=torch.bool, device=call.q.device)
        if memory is None:
            return every
        key = (*call.q.shape, call.layout)
        before: Marks | None = memory.recall(key)
        age = 0 if before is None else before.age + (before.step != call.step)
        if before is None or (pattern.reset is not None and age >= pattern.reset):
            computed, age = every, 0
        else:
            computed = unpacked(before.left, grid.chosen[1])
        left = pattern.left(call, grid, computed) if age % pattern.every == 0 else computed
        memory.keep(Marks(packed(left), age, call.step), key)
        return computed
