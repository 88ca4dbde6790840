"""How much blocks of queries want blocks of keys, and which of them are enough: what routing is made of.

All functions work on any device without waiting for it, and for all samples and heads at once. Tokens stand
in the order in which they are cut into blocks; the last block may be shorter.
"""

from __future__ import annotations

import torch

_SCORES_AT_ONCE = 2**26  # strided scores that are in memory at a time


def block_means(x: torch.Tensor, size: int) -> torch.Tensor:
    """The mean of every block of `size` tokens, over the tokens that there are, in at least fp32.

    Args:
        x: (B, H, S, D).

    Returns:
        (B, H, ceil(S / size), D).
    """
    exact, whole = torch.promote_types(x.dtype, torch.float32), x.shape[2] // size * size
    means = x[:, :, :whole].unflatten(2, (-1, size)).mean(3, dtype=exact)
    if whole == x.shape[2]:
        return means
    return torch.cat([means, x[:, :, whole:].mean(2, keepdim=True, dtype=exact)], 2)


def products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of many tokens, in at least fp32.

    16-bit numbers on a GPU are multiplied by its matrix units, which sum in fp32; each sum is rounded to 16
    bits once. In fp32 this would take longer there than the attention that is to be saved.
    """
    exact = torch.promote_types(a.dtype, torch.float32)
    if a.device.type == "cpu":
        a, b = a.to(exact), b.to(exact)
    return (a @ b).to(exact)


def self_similarity(x: torch.Tensor, size: int) -> torch.Tensor:
    """The mean cosine of all pairs of tokens of a block, (B, H, blocks) of (B, H, S, D); also with itself.

    It is the sum of the block's cosine Gram matrix / n^2, which is the squared length of the mean of its
    tokens' directions.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    return block_means(torch.nn.functional.normalize(x.to(exact), dim=-1), size).square().sum(-1)


def mean_weights(
    q: torch.Tensor, k: torch.Tensor, sizes: tuple[int, int], hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(mean q . mean k / sqrt D) over the blocks of keys: (B, H, query blocks, key blocks).

    Args:
        q, k: (B, H, S, D).
        sizes: tokens of a block of queries, and of keys.
        hidden: blocks of keys that get no weight, bool (B, H, key blocks).
    """
    scores = block_means(q, sizes[0]) * q.shape[3] ** -0.5 @ block_means(k, sizes[1]).mT
    if hidden is None:
        return scores.softmax(-1)
    weights = scores.masked_fill(hidden[:, :, None], -torch.inf).softmax(-1)
    return weights.masked_fill(hidden[:, :, None], 0)  # where all are hidden, the softmax is not a number


def antidiagonal_weights(
    q: torch.Tensor, k: torch.Tensor, sizes: tuple[int, int], stride: int
) -> torch.Tensor:
    """Attention mass of blocks, estimated by every `stride`-th antidiagonal of the scores (XAttention).

    In each `stride` x `stride` square query stride - 1 - j meets key j; the sum of these dot products /
    (stride sqrt D) is the score of its query group for its key group. A softmax over the key groups, summed
    over the groups of a block of keys and averaged over those of a block of queries: (B, H, query blocks, key
    blocks). Tokens past the end count as zeros, groups of such alone are left out.

    Args:
        q, k: (B, H, S, D).
        sizes: tokens of a block of queries, and of keys; multiples of `stride`.

    The products are 1 / (2 stride) of those of dense attention: 6.25% at a stride of 8, 3.1% at one of 16.
    """
    batch, heads, _, dim = q.shape

    def grouped(x: torch.Tensor, size: int, step: int) -> torch.Tensor:  # (B, H, blocks, groups, stride * D)
        x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(
            2, (-1, size // stride, stride)
        )
        return (x if step > 0 else x.flip(4)).flatten(4)

    queries, keys = grouped(q, sizes[0], -1), grouped(k, sizes[1], 1)
    groups = -(-q.shape[2] // stride), -(-k.shape[2] // stride)
    k_groups, columns = keys.shape[2] * keys.shape[3], keys.shape[2]
    exists = torch.arange(k_groups, device=k.device) < groups[1]
    keys = keys.flatten(2, 3).mT
    rows = []
    at_once = max(1, _SCORES_AT_ONCE // (batch * heads * queries.shape[3] * k_groups))
    for part in queries.split(at_once, 2):
        scores = products(part.flatten(2, 3) * (stride * dim**0.5) ** -1, keys)
        if k_groups > groups[1]:
            scores = scores.masked_fill_(~exists, -torch.inf)
        weights = scores.softmax(-1)
        rows.append(weights.unflatten(3, (columns, -1)).sum(-1).unflatten(2, (part.shape[2], -1)))
    mass = torch.cat(rows, 2)  # [B, H, query blocks, groups, key blocks]
    real = torch.arange(mass.shape[2] * mass.shape[3], device=q.device) < groups[0]
    real = real.view(mass.shape[2], mass.shape[3], 1)
    return (mass * real).sum(3) / real.sum(1)


def largest(weights: torch.Tensor, number: int | torch.Tensor) -> torch.Tensor:
    """The `number` largest of each row, bool like `weights` (..., n); of equals the first.

    Args:
        number: of all rows, or int64 (..., 1) of each.
    """
    order = weights.sort(dim=-1, descending=True, stable=True).indices
    first = torch.arange(weights.shape[-1], device=weights.device) < number
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, first.expand_as(order))


def top_blocks(
    weights: torch.Tensor,
    *,
    top_k: float | None = None,
    top_p: float | None = None,
    crossing: bool = False,
    least: int = 1,
) -> torch.Tensor:
    """The blocks of the largest weights in each row, bool like `weights` (..., n); of equals the first.

    Args:
        weights: not negative.
        top_k: share of the blocks: int(top_k * n), at least one.
        top_p: blocks in falling order while their sum stays within that share of the row's, at least one;
            with `crossing` also the one that takes it beyond.
        least: number of blocks. Of all that is given, whatever keeps the most.
    """
    size = weights.shape[-1]
    least = min(size, max(1, least, 0 if top_k is None else int(top_k * size)))
    if top_p is None and least == size:
        return torch.ones_like(weights, dtype=torch.bool)
    values, order = weights.sort(dim=-1, descending=True, stable=True)
    kept = torch.arange(size, device=weights.device) < least
    if top_p is not None:
        mass = values.cumsum(-1)
        limit = top_p * mass[..., -1:]
        kept = kept | ((mass - values < limit) if crossing else (mass <= limit))
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, kept.expand_as(order))
