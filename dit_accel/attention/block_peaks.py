"""The largest scores in blocks of queries and keys, of each query as far below its largest of all."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .block_scores import products

_SCORES_AT_ONCE = 2**25  # that are in memory at a time


def block_peaks(
    q: torch.Tensor,
    k: torch.Tensor,
    computed: torch.Tensor,
    sizes: tuple[int, int],
    *,
    rows: int | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """The largest q.k - M_q of every pair of blocks, M_q being the query's largest of all computed blocks.

    It is 0 where a query of the block has its strongest key, and -inf in blocks that are not computed. Made
    a few query blocks at a time, without waiting for the device.

    Args:
        q, k: (B, H, S, D) and (B, H, K, D), in the order in which they are cut into blocks; scaled.
        computed: blocks that count, bool (B, H, query blocks, key blocks).
        sizes: tokens of a block of queries, and of keys; the last ones may be shorter.
        rows: only of the first so many query blocks; None: of all.
        valid: keys that count, bool (B, K); None: all.

    Returns:
        (B, H, rows, key blocks), in at least fp32.
    """
    (bq, bk), exact = sizes, torch.promote_types(q.dtype, torch.float32)
    batch, heads, rows_of_all, columns = computed.shape
    rows = rows_of_all if rows is None else rows
    if not rows:
        return torch.zeros(batch, heads, 0, columns, dtype=exact, device=q.device)
    real = torch.arange(rows * bq, device=q.device) < q.shape[2]
    keys = F.pad(k, (0, 0, 0, columns * bk - k.shape[2])).mT
    absent = torch.arange(columns * bk, device=k.device) >= k.shape[2]
    if valid is not None:
        absent = absent | F.pad(~valid, (0, columns * bk - k.shape[2]))[:, None, None]
    queries = F.pad(q[:, :, : rows * bq], (0, 0, 0, max(0, rows * bq - q.shape[2])))
    at_once = max(1, _SCORES_AT_ONCE // (batch * heads * bq * columns * bk))
    parts = []
    for first in range(0, rows, at_once):
        stop = min(rows, first + at_once)
        scores = products(queries[:, :, first * bq : stop * bq], keys).masked_fill_(absent, -torch.inf)
        peaks = scores.unflatten(3, (columns, bk)).amax(4).unflatten(2, (-1, bq))  # (B, H, r, bq, C)
        peaks = peaks.masked_fill(~computed[:, :, first:stop, None], -torch.inf)
        largest = peaks.amax(4, keepdim=True).clamp(min=torch.finfo(exact).min)  # of rows of nothing
        below = (peaks - largest).masked_fill(~real[first * bq : stop * bq].view(-1, bq, 1), -torch.inf)
        parts.append(below.amax(3))
    return torch.cat(parts, 2)
