"""The compensated tail: keys that a query block does not compute, by the means of groups of them.

Key blocks stand in groups of `GROUP` consecutive keys, and these have parts of `PART` (more where a block has
more, fewer where blocks do not divide them). A
group of which a query's block computes nothing is pooled as one; of another each part is, over the rest that
is not computed. For a query q and every D that is pooled, kbar and vbar being the means of its n valid keys
and values, the softmax has one more term, of score and value

    scale q.kbar + log n,    vbar

(zeroth order of PISA, arXiv 2602.01077, and SVG-EAR, arXiv 2603.08982, which pool blocks of 64 and clusters).
So what is far from all that a block computes costs a key in `GROUP`, what is near it one in `PART`, whatever
the size of blocks.

Blocks that are computed are computed **whole**: the bits of a partial block hide keys to which their scores
are known already, and with a tail whatever is hidden is to be made up for; nothing does that as well as the
keys themselves, and the loop without bits is faster. Padded text and what is past the end stay hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.masks.block_mask import BlockMask

from ..merging import merge

GROUP, PART = 256, 64  # keys, unless a block has more
_CHUNK_BYTES = 32 << 20  # of pooled keys, values and scores at a time


@dataclass(frozen=True, eq=False)
class Tail:
    """What a mask with a tail computes and pools.

    Attributes:
        whole: the mask with every listed block computed whole; None: the mask is so already.
        dropped: whether a query block does not compute a key block, uint8 (G, R, groups of blocks, blocks of
            a group), 1 past the last block.
        part: blocks of a part.
    """

    whole: BlockMask | None
    dropped: torch.Tensor
    part: int

    @classmethod
    def of(cls, mask: BlockMask) -> Tail:
        """The tail of a mask, made once for each, on its device and without waiting for it."""
        return mask.derived(Tail, lambda: cls._of(mask))

    @classmethod
    def _of(cls, mask: BlockMask) -> Tail:
        blocks, part = blocks_of_group(mask.block_size[1])
        dropped = (~mask.listed_blocks()).to(torch.uint8)
        dropped = F.pad(dropped, (0, -mask.num_cols % blocks), value=1).unflatten(-1, (-1, blocks))
        whole = None if mask.has_whole_blocks else mask.with_whole_blocks()
        return cls(whole, dropped.contiguous(), part)

    def pools(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """What some query blocks pool, 0s and 1s: (G, groups, r, pools of a group, blocks of a group)."""
        dropped = self.dropped[:, rows].transpose(1, 2).bool().unsqueeze(3)
        place = torch.arange(dropped.shape[-1], device=dropped.device) // self.part
        parts = place == torch.arange(dropped.shape[-1] // self.part, device=dropped.device)[:, None]
        every = dropped.all(-1, keepdim=True)
        return torch.cat([dropped & every, dropped & parts & ~every], 3).to(dtype)


def blocks_of_group(keys: int) -> tuple[int, int]:
    """How many blocks of so many keys a group has, and a part of it, which divides it."""
    part = max(1, PART // keys)
    return max(1, GROUP // (keys * part)) * part, part


def pooled_density(mask: BlockMask) -> float:
    """Pooled keys of a query as a share of all keys, averaged over queries and heads."""
    return float(achieved_pooled_density(mask))


def achieved_pooled_density(mask: BlockMask) -> torch.Tensor:
    """`pooled_density` as a tensor, float64 () on the mask's device, which is not waited for."""
    tail = Tail.of(mask)
    left = tail.dropped.bool()
    exists = torch.arange(left[0, 0].numel(), device=left.device).view(left.shape[2:]) < mask.num_cols
    parts = (left & exists).unflatten(-1, (-1, tail.part)).any(-1).sum(-1)
    pools = torch.where(left.all(-1), 1, parts).sum(-1)  # (G, R)
    if mask.head_groups is not None:
        pools = pools[mask.head_groups.long()]
    return pools.double().mean() / mask.kv_len


def least_pooled_density(block_keys: int, kv_len: int) -> float:
    """The same of a query that computes nothing: what a mask costs at least that is not known yet."""
    return -(-kv_len // (block_keys * blocks_of_group(block_keys)[0])) / kv_len


def pooled_blocks(x: Tensor, mask: BlockMask, text_valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums of keys or values over each key block's valid tokens, in one pass, and how many those are.

    Args:
        x: (B, H, kv_len, D), in the mask's order.
        text_valid: how many text tokens of each sample are real, integers (B,); None: all.

    Returns:
        sums (B, H, C, D) and counts (B, C), or (1, C) where no text is padded; fp32, of fp64 fp64. Means are
        sums / counts; a block of padded text alone has a sum and a count of 0, whatever x holds there.
    """
    size, (start, stop), length = mask.block_size[1], mask.text, mask.kv_len
    first = torch.arange(mask.num_cols, device=x.device) * size
    count = (length - first).clamp(max=size)[None]
    if text_valid is None:
        sums = _sums(x, size)
    else:
        valid_end = start + text_valid[:, None].long()
        count = count - ((first + size).clamp(max=stop) - first.maximum(valid_end)).clamp(min=0)
        a, b = start // size * size, min(-(-stop // size) * size, length)
        key = torch.arange(a, b, device=x.device)
        hidden = (key >= valid_end) & (key < stop)  # (B, b - a)
        text = x[:, :, a:b].masked_fill(hidden[:, None, :, None], 0.0)
        sums = torch.cat([_sums(part, size) for part in (x[:, :, :a], text, x[:, :, b:])], 2)
    return sums, count.to(sums.dtype)


def _sums(x: Tensor, size: int) -> Tensor:
    """Over each `size` tokens of x (B, H, n, D), the last of which may be fewer."""
    dtype, whole = torch.promote_types(x.dtype, torch.float32), x.shape[2] // size
    sums = x[:, :, : whole * size].unflatten(2, (whole, size)).sum(3, dtype=dtype)
    if x.shape[2] == whole * size:
        return sums
    return torch.cat([sums, x[:, :, whole * size :].sum(2, keepdim=True, dtype=dtype)], 2)


def merged(
    attend: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    problem: Any,
    *,
    scale: float,
    text_valid: Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a backend without a tail of its own computes, joined with the tail by log-sum-exp."""
    tail = Tail.of(mask)
    problem = replace(problem, tail=None, return_lse=True)
    options = {"scale": scale, "text_valid": text_valid}
    out, lse = attend(q, k, v, tail.whole or mask, problem, **options)
    other, other_lse = _pooled(q, k, v, mask, tail, **options)
    return merge([out, other.to(out.dtype)], [lse, other_lse])


def _pooled(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, tail: Tail, *, scale: float, text_valid: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tail alone: out and lse over pooled keys, in fp32 (fp64 of fp64)."""
    parts, dim = [], q.shape[3]
    for pooled in pooled_rows(q, k, v, mask, tail, scale=scale, text_valid=text_valid):
        scores = pooled.scores()
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        scores = scores.masked_fill(nothing, 0.0)  # (B, H, r, bq, P)
        out = (scores.softmax(-1) @ pooled.value).masked_fill(nothing, 0.0)
        lse = scores.logsumexp(-1, keepdim=True).masked_fill(nothing, -math.inf)
        parts.append(torch.cat([out, lse], -1).flatten(2, 3))
    out, lse = torch.cat(parts, 2)[:, :, : mask.seq_len].split([dim, 1], -1)
    return out, lse.squeeze(-1)


@dataclass(frozen=True, eq=False)
class PooledRows:
    """What some query blocks attend to of a tail.

    Attributes:
        rows: which query blocks, r of them.
        q: scaled, (B, H, r, bq, D).
        key, value: means (B, H, r, P, D), P = groups * pools.
        left: of which blocks each is, 0s and 1s (B or 1, H, groups, r, pools, blocks of a group).
        number: of how many keys, (B or 1, H, groups, r, pools).
    """

    rows: slice
    q: Tensor
    key: Tensor
    value: Tensor
    left: Tensor
    number: Tensor

    def scores(self) -> Tensor:
        """(B, H, r, bq, P), -inf where there is no key."""
        return self.q @ self.key.mT + self.number.log().transpose(2, 3).flatten(3).unsqueeze(3)

    def to_blocks(self, x: Tensor) -> Tensor:
        """What means pass on to each token of their blocks: (B, H, r, P, n) to (B, H, groups * blocks, n)."""
        x = x.unflatten(3, (self.left.shape[2], self.left.shape[4])).transpose(2, 3)
        x = x / self.number.clamp(min=1)[..., None]
        return (self.left.flatten(3, 4).mT @ x.flatten(3, 4)).flatten(2, 3)


def pooled_rows(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, tail: Tail, *, scale: float, text_valid: Any
) -> Iterator[PooledRows]:
    """A tail in parts that take little memory, in fp32 (fp64 of fp64)."""
    batch, heads, _, dim = q.shape
    bq, (rows, groups, blocks) = mask.block_size[0], tail.dropped.shape[1:]
    pools = groups * (1 + blocks // tail.part)
    (keys, count), (values, _) = (pooled_blocks(x, mask, text_valid) for x in (k, v))
    short = groups * blocks - mask.num_cols
    sums = F.pad(torch.cat([keys, values], -1), (0, 0, 0, short)).unflatten(2, (groups, blocks))
    count = F.pad(count, (0, short)).view(-1, 1, groups, 1, 1, blocks)
    q = F.pad(q.to(sums.dtype) * scale, (0, 0, 0, rows * bq - q.shape[2])).unflatten(2, (rows, bq))
    of_head = mask.group_of_heads(batch, heads).long()
    at_once = max(1, _CHUNK_BYTES // (batch * heads * pools * (bq + 4 * dim) * sums.dtype.itemsize))
    for first in range(0, rows, at_once):
        chunk = slice(first, first + at_once)
        left = tail.pools(chunk, sums.dtype)[of_head]  # (B or 1, H, groups, r, pools, blocks)
        number = (left * count).sum(-1)
        means = (left.flatten(3, 4) @ sums).unflatten(3, left.shape[3:5]) / number.clamp(min=1)[..., None]
        key, value = means.transpose(2, 3).flatten(3, 4).split(dim, -1)  # (B, H, r, P, D)
        yield PooledRows(chunk, q[:, :, chunk], key, value, left, number)
