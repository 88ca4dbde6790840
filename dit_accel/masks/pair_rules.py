"""Rules: a pattern on one layout, answering for whole blocks first and per element only where it must.

A rule sees visual tokens by their row-major index. `side(tokens)` prepares blocks of tokens, int64 (n, b);
`classify` says for pairs of blocks whether any pair of tokens may be attended and whether all surely are;
`tiles` evaluates chosen pairs of blocks to packed bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, reduce

import torch

from .layout import TokenLayout
from .tiles import pack_bits

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

    def attends(self, q, k, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Whether any pair of tokens of chosen pairs of blocks is attended, bool (n,)."""
        bits, tile = self.tiles(q, k, r, c)
        return (bits != 0).flatten(1).any(1)[tile]


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
            self.cache["words"] = _key_words(table, self.labels)
        return self.cache["words"]


class FactorRule(Rule):
    """An AND of factors, such as one table per axis; blocks are classified by sums over rectangles of it."""

    def __init__(self, factors: list[Factor]):
        # tables that allow everything, as of an axis of one token, say nothing; the last one keeps the shape
        self.factors = [f for f in factors[:-1] if not f.table.all()] + factors[-1:]
        self._sums = [_rectangle_sums(factor.table) for factor in self.factors]

    def mask(self) -> torch.Tensor:
        mask = torch.ones(2 * self.factors[0].labels.shape, dtype=torch.bool, device="cpu")
        for factor in self.factors:
            mask &= factor.table[factor.labels[:, None], factor.labels]
        return mask

    def side(self, tokens: torch.Tensor) -> list[_LabelRange]:
        labels = [factor.labels[tokens] for factor in self.factors]
        return [_LabelRange(x, x.amin(1), x.amax(1)) for x in labels]

    def classify(self, q, k, rows: slice) -> Pair:
        def of_factor(sums, qs, ks) -> Pair:
            q_lo, q_hi = qs.lo[rows], qs.hi[rows]
            strip = sums[q_hi + 1] - sums[q_lo]
            count = strip[:, ks.hi + 1] - strip[:, ks.lo]
            area = (q_hi - q_lo + 1).to(sums.dtype)[:, None] * (ks.hi - ks.lo + 1).to(sums.dtype)
            return count > 0, count == area

        factors = map(of_factor, self._sums, q, k)
        return reduce(lambda one, other: (one[0] & other[0], one[1] & other[1]), factors)

    def tiles(self, q, k, r: torch.Tensor, c: torch.Tensor) -> Pair:
        bits = None
        for factor, qs, ks in zip(self.factors, q, k, strict=True):
            words = ks.words(factor.table)
            chosen = words.flatten(0, 1)[c[:, None] * words.shape[1] + qs.labels[r]]
            bits = chosen if bits is None else bits & chosen
        return bits.view(torch.uint8).view(*qs.labels[r].shape, -1), torch.arange(r.numel(), device="cpu")

    def attends(self, q, k, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """As `tiles`, which first prepares every key block for every label, from those alone that occur."""
        found = []
        for rows, columns in zip(r.split(4096), c.split(4096), strict=True):
            blocks, column = columns.unique(return_inverse=True)
            bits = None
            for factor, qs, ks in zip(self.factors, q, k, strict=True):
                first, last = int(qs.lo[rows].min()), int(qs.hi[rows].max())
                words = _key_words(factor.table[first : last + 1], ks.labels[blocks])
                label = qs.labels[rows] - first
                chosen = words.flatten(0, 1)[column[:, None] * words.shape[1] + label]
                bits = chosen if bits is None else bits & chosen
            found.append((bits != 0).flatten(1).any(1))
        return torch.cat(found)


def _key_words(table: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which keys of each block of labels (n, b) a query of each label attends to: integers (n, m, words)."""
    parts = [_as_words(pack_bits(table[:, part].transpose(0, 1))) for part in labels.split(64)]
    return torch.cat(parts)


def _rectangle_sums(table: torch.Tensor) -> torch.Tensor:
    """Number of True entries above and left of each corner: int32 or int64 (n + 1, n + 1)."""
    dtype = torch.int32 if table.numel() < 2**31 else torch.int64
    sums = table.cumsum(0, dtype=dtype).cumsum(1, dtype=dtype)
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

    @cached_property
    def shapes(self) -> torch.Tensor:
        """A hash of every block's coordinates relative to its corner: int64 (n,)."""
        return hash_rows((self.tokens - self.lo[:, None]).flatten(1))


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
        maybe = torch.zeros(len(q_lo), len(k.lo), dtype=torch.bool, device="cpu")
        sure = maybe.clone()
        bounds = self.bounds(q_lo[:, None], q_hi[:, None], k.lo[near], k.hi[near])
        maybe[:, near], sure[:, near] = bounds
        return maybe, sure

    def tiles(self, q: Box, k: Box, r: torch.Tensor, c: torch.Tensor) -> Pair:
        bits = [
            pack_bits(self.allows(q.tokens[rows, :, None], k.tokens[cols, None]))
            for rows, cols in zip(r.split(64), c.split(64), strict=True)
        ]
        return torch.cat(bits), torch.arange(r.numel(), device="cpu")


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
        key = torch.stack([q.shapes[r], k.shapes[c], hash_rows(k.lo[c] - q.lo[r])], 1)
        first, where = first_of_each(hash_rows(key))
        return super().tiles(q, k, r[first], c[first])[0], where


# -- an AND of two rules ----------


class BothRules(Rule):
    """What two rules both allow."""

    def __init__(self, one: Rule, other: Rule):
        self.rules = one, other

    def mask(self) -> torch.Tensor:
        one, other = self.rules
        return one.mask() & other.mask()

    def side(self, tokens: torch.Tensor) -> Pair:
        one, other = self.rules
        return one.side(tokens), other.side(tokens)

    def classify(self, q: Pair, k: Pair, rows: slice) -> Pair:
        answers = zip(
            *(rule.classify(*of, rows) for rule, *of in zip(self.rules, q, k, strict=True)), strict=True
        )
        maybe, sure = (one & other for one, other in answers)
        return maybe, sure

    def tiles(self, q: Pair, k: Pair, r: torch.Tensor, c: torch.Tensor) -> Pair:
        one, other = (rule.tiles(*of, r, c) for rule, *of in zip(self.rules, q, k, strict=True))
        pairs, where = torch.stack([one[1], other[1]], 1).unique(dim=0, return_inverse=True)
        return one[0][pairs[:, 0]] & other[0][pairs[:, 1]], where


def hash_rows(rows: torch.Tensor) -> torch.Tensor:
    """A 64-bit hash of every row of an integer tensor (n, m): int64 (n,)."""
    generator = torch.Generator(device="cpu").manual_seed(0x5EED)
    weights = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator, device="cpu") * 2 + 1
    mixed = (rows.long() + 0x1E3779B97F4A7C15) * weights
    return ((mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9).sum(1)


def first_of_each(keys: torch.Tensor) -> Pair:
    """Index of the first occurrence of every distinct key, and for each key which of them it is."""
    distinct, where = keys.unique(return_inverse=True)
    first = torch.full((distinct.numel(),), keys.numel(), dtype=torch.int64, device="cpu")
    return first.scatter_reduce_(0, where, torch.arange(keys.numel(), device="cpu"), "amin"), where
