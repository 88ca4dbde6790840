"""How much of each head's attention falls into each pair of blocks, for several orders of the tokens at once.

With P the map of attention weights, the mass of blocks (i, j) is the sum of P over queries of i and keys of
j. It is summed row by row of P in one pass, so that no map of S x S is ever there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dit_accel.attention.call import AttentionCall

_CHUNK_BYTES = 64 << 20  # of weights at a time


def block_mass(
    call: AttentionCall,
    labels: Sequence[torch.Tensor],
    queries: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mass of all pairs of blocks of visual tokens, summed over the samples of a call.

    Text and anchor keys take their share of the weights and padded text none; the weights are fp32 (of fp64
    inputs fp64).

    Args:
        call: with its tokens in the model's order.
        labels: the block of each visual token under each order, int64 (V,), numbered without gaps.
        queries: which visual tokens are looked at, int64 (n,); None: all.

    Returns:
        (H, orders, blocks, blocks), fp32 (of fp64 inputs fp64), on the device of the call.
    """
    q, k, visual = call.q, call.k, call.layout.visual_slice
    exact = torch.promote_types(q.dtype, torch.float32)
    at = torch.arange(call.layout.visual_len, device=q.device) if queries is None else queries.to(q.device)
    labels = [own.to(q.device) for own in labels]
    orders = [torch.argsort(own, stable=True) for own in labels]
    sizes = [torch.bincount(own) for own in labels]
    count = len(sizes[0])
    mass = torch.zeros(q.shape[1], len(labels), count, count, dtype=exact, device=q.device)
    hidden = call.hidden_keys()
    keys = k.to(exact).mT
    at_once = max(1, _CHUNK_BYTES // (q.shape[0] * q.shape[1] * k.shape[2] * exact.itemsize))
    for rows in at.split(at_once):
        scores = q[:, :, visual.start + rows].to(exact) * call.factor @ keys
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None], -math.inf)
        weights = scores.softmax(-1)[..., visual].sum(0)  # (H, r, V)
        for number, (own, order, size) in enumerate(zip(labels, orders, sizes, strict=True)):
            of_blocks = _block_sums(weights[..., order], size)
            mass[:, number].index_add_(1, own[rows], of_blocks)
    return mass


def _block_sums(weights: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Sums over blocks of consecutive columns, all of the first one's size but the last: (..., blocks)."""
    size, length = int(sizes[0]), weights.shape[-1]
    whole = length // size * size
    sums = weights[..., :whole].unflatten(-1, (-1, size)).sum(-1)
    if whole == length:
        return sums
    return torch.cat([sums, weights[..., whole:].sum(-1, keepdim=True)], -1)
