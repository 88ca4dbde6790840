"""Which heads each of several processes computes, where heads differ in how much there is to do.

Processes that share a layer by its heads wait for the one that has most to do. Neighbouring heads may be all
the dense ones; so heads are dealt out, the largest first, each to the process that has least so far and still
has room: every process gets as many heads as it would of neighbours.

Source: Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17(2), 1969 (largest first).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Balance:
    """The heads of each process in a layer whose heads differ.

    Attributes:
        groups: of each process its heads, ascending.
        neighbours, balanced: what the process with most to do computes, as a multiple of the mean, where each
            has neighbouring heads, and with these groups.
        order, inverse: int64 (H,), the heads of one process after those of the other, and where each then is.
    """

    groups: tuple[tuple[int, ...], ...]
    neighbours: float
    balanced: float
    order: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, work: Sequence[float], sizes: Sequence[int], device: torch.device | str) -> Balance | None:
        """The groups for heads with so much to do; None where all have as much.

        Args:
            work: of each head, in any unit.
            sizes: how many heads each process gets.
            device: where `order` and `inverse` are to be.
        """
        if len(set(work)) == 1:
            return None
        ends = [sum(sizes[: rank + 1]) for rank in range(len(sizes))]
        beside = [tuple(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
        dealt = _dealt(work, sizes)
        before, after = _excess(work, beside), _excess(work, dealt)
        if after >= before:
            dealt, after = beside, before
        order = torch.tensor([head for group in dealt for head in group], dtype=torch.int64, device=device)
        return cls(tuple(dealt), before, after, order, torch.argsort(order))


def _dealt(work: Sequence[float], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    groups: list[list[int]] = [[] for _ in sizes]
    load = [0.0] * len(sizes)
    for head in sorted(range(len(work)), key=lambda head: (-work[head], head)):
        room = [rank for rank, size in enumerate(sizes) if len(groups[rank]) < size]
        least = min(room, key=lambda rank: (load[rank], rank))
        groups[least].append(head)
        load[least] += work[head]
    return [tuple(sorted(group)) for group in groups]


def _excess(work: Sequence[float], groups: Sequence[Sequence[int]]) -> float:
    """The work of the group with most, as a multiple of the mean of groups."""
    return max(sum(work[head] for head in group) for group in groups) * len(groups) / sum(work)
