"""Rules: a pattern on one layout, answering for whole blocks first and per element only where it must.

A rule sees visual tokens by their row-major index. `side(tokens)` prepares blocks of tokens, int64 (n, b);
`classify` says for pairs of blocks whether any pair of tokens may be attended and whether all surely are;
`tiles` evaluates chosen pairs of blocks to packed bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .blockmask import pack_bits
from .layout import TokenLayout

Pair = tuple[torch.Tensor, torch.Tensor]


class Rule:
    """See the module docstring."""

    def mask(self) -> torch.Tensor:
        """Dense bool (V, V). Small sizes only."""
        raise NotImplementedError

    def side(self, tokens: torch.Tensor):
        raise NotImplementedError

    def classify(self, q, k, rows: slice) -> Pair:
        """(maybe, sure), each bool (len(rows), C), for the query blocks `rows` against all key blocks."""
        raise NotImplementedError

    def tiles(self, q, k, r: torch.Tensor, c: torch.Tensor) -> Pair:
        """Packed bits uint8 (u, bq, bk / 8), and which of them is each pair's tile, int64 (n,)."""
        raise NotImplementedError


# -- an AND of tables ----------


@dataclass(frozen=True, eq=False)
class Factor:
    """Token i attends to token j iff `table[labels[i], labels[j]]`: labels int64 (V,), table bool (n, n)."""

    labels: torch.Tensor
    table: torch.Tensor


@dataclass(frozen=True, eq=False)
class _LabelRange:
    labels: torch.Tensor  # (n, b)
    lo: torch.Tensor  # (n,)
    hi: torch.Tensor  # (n,)
    cache: dict = field(default_factory=dict)

    def words(self, table: torch.Tensor) -> torch.Tensor:
        """Which keys of block i a query with label j attends to, as bits: integers (n, labels, words)."""
        if "words" not in self.cache:
            parts = [_as_words(pack_bits(table[:, part].transpose(0, 1))) for part in self.labels.split(64)]
            self.cache["words"] = torch.cat(parts)
        return self.cache["words"]


class FactorRule(Rule):
    """An AND of factors, such as one table per axis; blocks are classified by sums over rectangles of it."""

    def __init__(self, factors: list[Factor]):
        self.factors = factors
        self._sums = [_rectangle_sums(factor.table) for factor in factors]

    def mask(self) -> torch.Tensor:
        mask = torch.ones(2 * self.factors[0].labels.shape, dtype=torch.bool)
        for factor in self.factors:
            mask &= factor.table[factor.labels[:, None], factor.labels]
        return mask

    def side(self, tokens: torch.Tensor) -> list[_LabelRange]:
        labels = [factor.labels[tokens] for factor in self.factors]
        return [_LabelRange(x, x.amin(1), x.amax(1)) for x in labels]

    def classify(self, q, k, rows: slice) -> Pair:
        maybe = sure = None
        for sums, qs, ks in zip(self._sums, q, k, strict=True):
            q_lo, q_hi = qs.lo[rows], qs.hi[rows]
            strip = sums[q_hi + 1] - sums[q_lo]
            count = strip[:, ks.hi + 1] - strip[:, ks.lo]
            area = (q_hi - q_lo + 1).int()[:, None] * (ks.hi - ks.lo + 1).int()
            any_here, all_here = count > 0, count == area
            maybe = any_here if maybe is None else maybe & any_here
            sure = all_here if sure is None else sure & all_here
        return maybe, sure

    def tiles(self, q, k, r: torch.Tensor, c: torch.Tensor) -> Pair:
        bits = None
        for factor, qs, ks in zip(self.factors, q, k, strict=True):
            words = ks.words(factor.table)
            chosen = words.flatten(0, 1)[c[:, None] * words.shape[1] + qs.labels[r]]
            bits = chosen if bits is None else bits & chosen
        return bits.view(torch.uint8).view(*qs.labels[r].shape, -1), torch.arange(r.numel())


def _rectangle_sums(table: torch.Tensor) -> torch.Tensor:
    """Number of True entries above and left of each corner: int32 (n + 1, n + 1)."""
    sums = table.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
    return torch.nn.functional.pad(sums, (1, 0, 1, 0))


def _as_words(packed: torch.Tensor) -> torch.Tensor:
    """View rows of bytes as the widest integers that fit, to move fewer elements."""
    sizes = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    return packed.view(next(dtype for size, dtype in sizes.items() if packed.shape[-1] % size == 0))


# -- functions of coordinates ----------


@dataclass(frozen=True, eq=False)
class Box:
    """Coordinates of blocks of tokens, int32 (n, b, 3), and the corners of their boxes, (n, 3) inclusive."""

    tokens: torch.Tensor
    lo: torch.Tensor
    hi: torch.Tensor


class PairRule(Rule):
    """Any function of the two tokens' coordinates.

    Args:
        layout: token geometry.
        allows: (q, k), int32 (..., 3) that broadcast, to bool (...).
        bounds: (q_lo, q_hi, k_lo, k_hi), int32 (..., 3) corners of boxes, to (maybe, sure), bool (...); maybe
            may be True and sure False where the truth is not known.
    """

    def __init__(self, layout: TokenLayout, allows: Callable, bounds: Callable):
        self.coordinates, self.allows, self.bounds = layout.coordinates, allows, bounds

    def mask(self) -> torch.Tensor:
        return self.allows(self.coordinates[:, None], self.coordinates[None])

    def side(self, tokens: torch.Tensor) -> Box:
        coordinates = self.coordinates[tokens]
        return Box(coordinates, coordinates.amin(1), coordinates.amax(1))

    def classify(self, q: Box, k: Box, rows: slice) -> Pair:
        q_lo, q_hi = q.lo[rows], q.hi[rows]
        near = self.bounds(q_lo.amin(0), q_hi.amax(0), k.lo, k.hi)[0].nonzero()[:, 0]  # of any of the rows
        maybe = torch.zeros(len(q_lo), len(k.lo), dtype=torch.bool)
        sure = maybe.clone()
        bounds = self.bounds(q_lo[:, None], q_hi[:, None], k.lo[near], k.hi[near])
        maybe[:, near], sure[:, near] = bounds
        return maybe, sure

    def tiles(self, q: Box, k: Box, r: torch.Tensor, c: torch.Tensor) -> Pair:
        bits = [
            pack_bits(self.allows(q.tokens[rows, :, None], k.tokens[cols, None]))
            for rows, cols in zip(r.split(64), c.split(64), strict=True)
        ]
        return torch.cat(bits), torch.arange(r.numel())


class OffsetRule(PairRule):
    """A function of the offset from query to key alone: blocks of one shape at one offset share a tile.

    Args:
        layout: token geometry.
        allows: offset, int32 (..., 3), to bool (...).
        bounds: (nearest, farthest), int32 (..., 3): the least and largest absolute offset per axis between
            two boxes, to (maybe, sure) as for `PairRule`.
    """

    def __init__(self, layout: TokenLayout, allows: Callable, bounds: Callable):
        def box_bounds(q_lo, q_hi, k_lo, k_hi):
            apart = torch.maximum(k_lo - q_hi, q_lo - k_hi)
            return bounds(apart.clamp(min=0), torch.maximum(k_hi - q_lo, q_hi - k_lo))

        super().__init__(layout, lambda q, k: allows(k - q), box_bounds)

    def tiles(self, q: Box, k: Box, r: torch.Tensor, c: torch.Tensor) -> Pair:
        def shapes(box: Box) -> torch.Tensor:
            return hash_rows((box.tokens - box.lo[:, None]).flatten(1))

        key = torch.stack([shapes(q)[r], shapes(k)[c], hash_rows(k.lo[c] - q.lo[r])], 1)
        first, where = first_of_each(hash_rows(key))
        return super().tiles(q, k, r[first], c[first])[0], where


def hash_rows(rows: torch.Tensor) -> torch.Tensor:
    """A 64-bit hash of every row of an integer tensor (n, m): int64 (n,)."""
    generator = torch.Generator().manual_seed(0x5EED)
    weights = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator) * 2 + 1
    mixed = (rows.long() + 0x1E3779B97F4A7C15) * weights
    return ((mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9).sum(1)


def first_of_each(keys: torch.Tensor) -> Pair:
    """Index of the first occurrence of every distinct key, and for each key which of them it is."""
    distinct, where = keys.unique(return_inverse=True)
    first = torch.full((distinct.numel(),), keys.numel(), dtype=torch.int64)
    return first.scatter_reduce_(0, where, torch.arange(keys.numel()), "amin"), where
