"""Block-sparse attention, the specification: dense attention under the mask's bits.

For query i with the set of keys J(i):

    lse_i = log sum_{j in J(i)} exp(scale q_i.k_j),    out_i = sum_{j in J(i)} exp(scale q_i.k_j - lse_i) v_j

A row with empty J(i), or with no score above -inf, has out_i = 0 and lse_i = -inf.

With a tail (`tail.py`) J(i) holds all valid keys of the blocks that i's query block computes. There is one
key more for each group of blocks that it leaves out altogether, and for each part of the other groups: the
mean of the valid keys there outside J(i), n of them, with log n added to its score, and the mean of their
values.

Quantized, q, k and v are those of `quantized.py`, and exp is rounded as the format says (`Format.powers`),
in the numerator and in the sum below it, so that weights add up to 1 and results over several sets of keys
merge to that over all of them.

With a `pv_threshold` numerators leave out what `skipped` says; denominators have everything.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from dit_accel.masks.block_mask import BlockMask

from .formats import FORMATS, Format
from .problem import Backend, Problem, valid_keys
from .quantized import LOG2_E, Quantized
from .tail import blocks_of_group


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    scale: float,
    text_valid: torch.Tensor | None = None,
    tail: str | None = None,
    pv_threshold: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_sparse_attention` on the dense mask, in fp32 (float64 for float64 inputs). Needs S x S memory.

    Args:
        q: (batch, heads, seq_len, head_dim); k, v: (batch, heads, kv_len, head_dim); all in kernel order.
        text_valid: (batch,) valid text tokens of each sample, or None for all.

    Returns:
        out like q, and lse (batch, heads, seq_len) in fp32 (float64 for float64 inputs).
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    dtype, (q, k, v) = q.dtype, (x.to(exact) for x in (q, k, v))
    allowed = (dense_mask if tail is None else computed_keys)(mask, *q.shape[:2], text_valid)
    scores = (q @ k.mT * scale).masked_fill(~allowed, -math.inf)
    keys, values, number = (_no_tail if tail is None else _pooled)(k, v, mask, allowed, text_valid)
    lost = None if pv_threshold is None else skipped(scores * LOG2_E, mask, pv_threshold)
    scores = torch.cat([scores, torch.einsum("bhsd,bhspd->bhsp", q, keys) * scale + number.log()], -1)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0.0)
    lse = scores.logsumexp(-1, keepdim=True)
    lse = lse.masked_fill(lse == math.inf, math.nan)  # no probability is infinity / infinity
    p, pooled = (scores - lse).exp().split([mask.kv_len, number.shape[-1]], -1)
    p = p if lost is None else p.masked_fill(lost, 0.0)
    out = p @ v + torch.einsum("bhsp,bhspd->bhsd", pooled, values)
    return out.masked_fill(nothing, 0.0).to(dtype), lse.masked_fill(nothing, -math.inf).squeeze(-1)


def quantized_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    format: Format,
    *,
    scale: float,
    text_valid: torch.Tensor | None = None,
    smooth: bool = True,
    pv_threshold: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` in a numeric format; without `smooth` of keys that keep their mean, to show why."""
    dtype, exact = q.dtype, torch.promote_types(q.dtype, torch.float32)
    allowed = dense_mask(mask, *q.shape[:2], text_valid)
    given = Quantized.of(q, k, v, mask, format, scale=scale, text_valid=text_valid, smooth=smooth)
    wide_q, wide_k, wide_v = given.widened(exact)
    scores = (wide_q @ wide_k.mT).masked_fill(~allowed, -math.inf)
    top = scores.amax(-1, keepdim=True)
    nothing = top == -math.inf
    top = top.masked_fill(nothing, 0.0)
    short = -mask.kv_len % given.group
    p = format.powers(F.pad(scores - top, (0, short), value=-math.inf), given.group)[..., : mask.kv_len]
    total = p.sum(-1, keepdim=True)
    if pv_threshold is not None:
        p = p.masked_fill(skipped(scores, mask, pv_threshold), 0.0)
    out = (p @ wide_v / total).masked_fill(nothing, 0.0)
    lse = ((top + total.log2()) / LOG2_E).masked_fill(nothing, -math.inf).squeeze(-1)
    out, lse = given.finished(out, lse)
    return out.to(dtype), lse


def skipped(
    scores: torch.Tensor, mask: BlockMask, threshold: float, piece: tuple[int, int] | None = None
) -> torch.Tensor:
    """Of which keys each query leaves the values out: bool, like scores.

    A query block goes through its key blocks, the full ones first and then the partial ones, each in the
    order of the keys, and keeps the largest score of every row so far. With m_local a row's largest score in
    a block and m_new its largest so far, that block included, values are left out where

        max over rows (m_local - m_new) + threshold <= 0

    (SpargeAttn, arXiv 2502.18137). Kernels judge pieces of blocks where they compute these at once; what the
    rule leaves out in whole blocks it leaves out in every piece of them.

    Args:
        scores: in base 2, -inf where not attended, (batch, heads, seq_len, kv_len).
        piece: queries and keys that are judged together, a part of a block's; None: whole blocks.
    """
    (bq, bk), (rows, keys) = mask.block_size, piece or mask.block_size
    batch, heads, queries, length = scores.shape
    parts, cols = bk // keys, mask.num_cols
    tiles = mask.block_tiles()
    kind = torch.where(tiles == -2, 0, torch.where(tiles == -1, 2, 1))
    order = kind.argsort(dim=-1, stable=True)  # (G, R, C)
    order = (order[..., None] * parts + torch.arange(parts, device=order.device)).flatten(-2)
    order = order[mask.group_of_heads(batch, heads).long()]
    order = order.repeat_interleave(bq, 2)[:, :, :queries].expand(batch, heads, -1, -1)
    largest = F.pad(scores, (0, cols * bk - length), value=-math.inf).unflatten(-1, (-1, keys)).amax(-1)
    local = largest.gather(-1, order)
    lag = (local - local.cummax(-1).values).nan_to_num(-math.inf, neginf=-math.inf)
    lag = F.pad(lag, (0, 0, 0, -queries % bq), value=-math.inf).unflatten(2, (-1, bq))
    lag = F.pad(lag, (0, 0, 0, -bq % rows), value=-math.inf).unflatten(3, (-1, rows)).amax(4, keepdim=True)
    out = (lag + threshold <= 0).expand(-1, -1, -1, -1, rows, -1).flatten(3, 4)[:, :, :, :bq]
    out = out.flatten(2, 3)[:, :, :queries]
    judged = torch.zeros_like(out).scatter_(-1, order, out)
    return judged.repeat_interleave(keys, -1)[..., :length]


def dense_mask(
    mask: BlockMask, batch: int, heads: int, text_valid: torch.Tensor | None = None
) -> torch.Tensor:
    """What each query attends to: bool, broadcastable to (batch, heads, seq_len, kv_len), in kernel order."""
    allowed = mask.to_kernel_mask()[mask.group_of_heads(batch, heads).long()]
    return allowed & valid_keys(mask, text_valid)


def computed_keys(
    mask: BlockMask, batch: int, heads: int, text_valid: torch.Tensor | None = None
) -> torch.Tensor:
    """`dense_mask` with a tail: all valid keys of the blocks that are listed for a query's block."""
    rows, columns = (
        torch.arange(length, device=mask.device) // size
        for length, size in zip((mask.seq_len, mask.kv_len), mask.block_size, strict=True)
    )
    listed = (mask.block_tiles() != -1)[:, rows][:, :, columns]
    return listed[mask.group_of_heads(batch, heads).long()] & valid_keys(mask, text_valid)


def _pooled(k, v, mask: BlockMask, computed: torch.Tensor, text_valid: torch.Tensor | None):
    """For each query the means of what it pools, keys and values (batch, heads, seq_len, P, D), and how many
    keys there are of each, (batch, heads, seq_len, P)."""
    valid, key = valid_keys(mask, text_valid), torch.arange(mask.kv_len, device=mask.device)
    block = key // mask.block_size[1]
    group, part = (block // n for n in blocks_of_group(mask.block_size[1]))
    groups, parts = (x == torch.arange(int(x[-1]) + 1, device=x.device)[:, None] for x in (group, part))
    # blocks of padded text are computed or not like others
    listed = computed_keys(mask, *k.shape[:2])
    untouched = ~(listed.unsqueeze(3) & groups).any(-1)  # (batch, heads, seq_len, groups)
    near = (~untouched)[..., group]
    left = valid & ~computed
    pools = [(left & ~near).unsqueeze(3) & groups, (left & near).unsqueeze(3) & parts]
    left = torch.cat(pools, 3).to(k.dtype)
    number = left.sum(-1).expand(*k.shape[:2], -1, -1)
    hidden = ~valid.mT  # whatever is there
    k, v = (left @ x.masked_fill(hidden, 0.0).unsqueeze(2) for x in (k, v))
    count = number.clamp(min=1).unsqueeze(-1)
    return k / count, v / count, number


def _no_tail(k, v, mask: BlockMask, *_):
    none = k.new_empty(*k.shape[:2], mask.seq_len, 0, k.shape[3])
    return none, none, none[..., 0]


def _attend(q, k, v, mask, problem: Problem, **options) -> tuple[torch.Tensor, torch.Tensor]:
    options["pv_threshold"] = problem.pv_threshold
    if problem.quantization is not None:
        return quantized_attention(q, k, v, mask, FORMATS[problem.quantization], **options)
    return attention(q, k, v, mask, tail=problem.tail, **options)


BACKEND = Backend(
    "reference",
    _attend,
    dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    condition=lambda problem: None,
    formats=tuple(FORMATS),
    backward=True,
    own_tail=True,
    skips_values=True,
)
