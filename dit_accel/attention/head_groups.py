"""Attention of layers whose heads differ in kind: each group of heads by a kind of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from .call import AttentionCall, LayerAttention, LayerSizes
from .tail_densities import tail_densities


@dataclass(frozen=True, eq=False)
class HeadGroups(LayerAttention):
    """Several kinds of attention, each of some heads.

    Attributes:
        groups: (heads, their attention); every head is in one.
    """

    groups: tuple[tuple[list[int], LayerAttention], ...]
    mask = None

    def _mean(self, name: str) -> float:
        sizes = [(len(heads), getattr(attention, name)) for heads, attention in self.groups]
        return sum(n * value for n, value in sizes) / sum(n for n, _ in sizes)

    @property
    def density(self) -> float:
        return self._mean("density")

    @property
    def block_density(self) -> float:
        return self._mean("block_density")

    def pairs_beside(self, sizes: LayerSizes) -> float:
        counted = [(len(heads), attention.pairs_beside(sizes)) for heads, attention in self.groups]
        return sum(n * pairs for n, pairs in counted) / sum(n for n, _ in counted)

    @property
    def nbytes(self) -> int:
        return sum(attention.nbytes for _, attention in self.groups)

    def resolved(self, call: AttentionCall) -> HeadGroups:
        parts = self._each(call, lambda attention, own: attention.resolved(own))
        return replace(
            self, groups=tuple((heads, part) for (heads, _), part in zip(self.groups, parts, strict=True))
        )

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        return self._joined(self._each(call, lambda attention, own: attention(own)))

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = self._each(call, lambda attention, own: attention.with_lse(own))
        return self._joined([out for out, _ in pairs]), self._joined([lse for _, lse in pairs])

    def _each(self, call: AttentionCall, compute: Callable[[LayerAttention, AttentionCall], Any]) -> list:
        """What each group computes of its heads; the call's notes are of all of them."""
        results, achieved = [], 0.0
        for (heads, attention), known in zip(self.groups, self._densities(call.tail), strict=True):
            own = replace(call.of_heads(heads), notes={})
            results.append(compute(attention, own))
            call.notes.update(own.notes)
            share = len(heads) / call.q.shape[1]
            achieved = achieved + own.notes.get("achieved", known.to(call.q.device)) * share
        if "achieved" in call.notes:
            call.notes["achieved"] = achieved
        return results

    def _densities(self, tail: str | None) -> list[torch.Tensor]:
        """Density and block density of each group, where no call tells otherwise."""
        return self._without_tail if tail is None else self._with_tail

    @cached_property
    def _without_tail(self) -> list[torch.Tensor]:
        return [_pair(attention.density, attention.block_density) for _, attention in self.groups]

    @cached_property
    def _with_tail(self) -> list[torch.Tensor]:
        return [_pair(*tail_densities(attention)) for _, attention in self.groups]

    def _joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Each group's part in the place of its heads."""
        order = [head for heads, _ in self.groups for head in heads]
        places = torch.argsort(torch.tensor(order, dtype=torch.int64, device="cpu"))
        return torch.cat(list(parts), dim=1)[:, places.to(parts[0].device)]


def _pair(density: float, block_density: float) -> torch.Tensor:
    return torch.tensor((density, block_density), dtype=torch.float64, device="cpu")
