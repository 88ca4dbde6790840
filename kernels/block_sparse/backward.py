"""Gradients of block-sparse attention from its output and log-sum-exp, in plain PyTorch over the block lists.

With p_ij = exp(scale q_i.k_j - lse_i) for the keys j that query i attends to, and gradients dout and dlse,

    dv_j = sum_i p_ij dout_i
    ds_ij = p_ij (dout_i.v_j - delta_i),    delta_i = dout_i.out_i - dlse_i
    dq_i = scale sum_j ds_ij k_j,    dk_j = scale sum_i ds_ij q_i

as FlashAttention-2 has them (Dao 2023): scores are computed again, chunk by chunk, and never kept. With a
tail out and lse are those over all keys, so that its pooled keys follow the same formulas; what the means get
goes to their keys in equal parts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dit_accel.masks.block_mask import BlockMask

from .gather import TileTable, Workspace, blocks_of, hide, largest_score, text_bias
from .gather_chunks import chunks_of
from .problem import Backend, Lengths, Problem, valid_keys
from .tail import Tail, pooled_rows


class WithGradients(torch.autograd.Function):
    """What a backend computes, out and lse, with the gradients that it says, `gradients` or others."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        backend: Backend,
        mask: BlockMask,
        problem: Problem,
        options: dict,
    ) -> tuple[Tensor, Tensor | None]:
        problem = replace(problem, requires_grad=False, return_lse=True)
        out, lse = backend.compute(q, k, v, mask, problem, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.gradients, ctx.mask, ctx.options = backend.gradients, mask, options | {"tail": problem.tail}
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors
        return *ctx.gradients(q, k, v, ctx.mask, out, lse, *grads, **ctx.options), *[None] * 4


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    *,
    scale: float,
    text_valid: Lengths = None,
    tail: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, in their dtype; computed in fp32, of float64 in float64.

    Args:
        q, k, v, mask, scale, text_valid, tail: as of `block_sparse_attention`.
        out, lse: what it returned, (batch, heads, seq_len, head_dim) and (batch, heads, seq_len).
        dout, dlse: gradients of them; None: lse has none.
    """
    exact, given = torch.promote_types(q.dtype, torch.float32), q.dtype
    q, k, v, out, dout = (x.to(exact) for x in (q, k, v, out, dout))
    nothing = lse == -math.inf
    lse = lse.to(exact).masked_fill(nothing, 0.0)
    delta = (dout * out).sum(-1) - (0.0 if dlse is None else dlse.to(exact).masked_fill(nothing, 0.0))
    options = {"scale": scale, "text_valid": text_valid}
    pooled = None if tail is None else Tail.of(mask)
    computed = mask if pooled is None else pooled.whole or mask
    found = _of_blocks(q, k, v, computed, lse, dout, delta, **options)
    if pooled is not None:
        more = of_tail(q, k, v, mask, pooled, lse, dout, delta, **options)
        found = tuple(a + b for a, b in zip(found, more, strict=True))
    dq, dk, dv = found
    return dq.to(given), dk.to(given), dv.to(given)


def _of_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    lse: Tensor,
    dout: Tensor,
    delta: Tensor,
    *,
    scale: float,
    text_valid: Lengths,
) -> tuple[torch.Tensor, ...]:
    """Through the keys in listed blocks."""
    batch, heads, _, dim = q.shape
    bq, bk = mask.block_size
    finite = math.isfinite(largest_score(q, k, scale))
    table = mask.derived(TileTable, lambda: TileTable.of(mask, q.dtype), q.dtype).table
    q_blocks, dout_blocks = (blocks_of(x, bq) for x in (q, dout))
    lse_blocks, delta_blocks = (blocks_of(x[..., None], bq) for x in (lse, delta))
    k_blocks, v_blocks = (blocks_of(x, bk) for x in (k, v))
    dq, dk, dv = (torch.zeros_like(x) for x in (q_blocks, k_blocks, v_blocks))
    workspace = Workspace(q_blocks, mask.block_size, reuse=False)
    for chunk in chunks_of(mask, batch, heads, dim, q.dtype):
        bias = workspace.bias_of(chunk, table)
        for part in chunk.rounds:
            row, key = part.query_blocks, part.keys
            if key is None:
                key = torch.add(part.first_key, chunk.cols.view(-1)).view(-1)
            of_queries = (x.index_select(0, row).view(len(row), bq, -1) for x in (q_blocks, dout_blocks))
            one_q, one_dout = of_queries
            one_k, one_v = (x.index_select(0, key).view(len(row), -1, dim) for x in (k_blocks, v_blocks))
            p = torch.bmm(one_q, one_k.mT).mul_(scale)
            masked = p.view(len(part.first_key), len(chunk.rows), bq, -1)[..., chunk.first_masked * bk :]
            if bias is not None:
                hide(masked, bias, finite)
            if text_valid is not None and chunk.touches_text:
                sample = part.first_key[:, 0] // mask.num_cols // heads
                hide(masked, text_bias(chunk, mask, text_valid.index_select(0, sample), p.dtype), finite)
            p.sub_(lse_blocks.index_select(0, row)[..., None]).exp_()
            ds = torch.bmm(one_dout, one_v.mT).sub_(delta_blocks.index_select(0, row)[..., None]).mul_(p)
            dq.index_copy_(0, row, torch.bmm(ds, one_k).view(len(row), -1))
            dk.index_add_(0, key, torch.bmm(ds.mT, one_q).view(len(key), -1))
            dv.index_add_(0, key, torch.bmm(p.mT, one_dout).view(len(key), -1))
    found = (
        (dq.mul_(scale), mask.num_rows * bq, mask.seq_len),
        (dk.mul_(scale), mask.num_cols * bk, mask.kv_len),
    )
    found = (*found, (dv, mask.num_cols * bk, mask.kv_len))
    return tuple(x.view(batch, heads, padded, dim)[:, :, :length] for x, padded, length in found)


def of_tail(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    tail: Tail,
    lse: Tensor,
    dout: Tensor,
    delta: Tensor,
    *,
    scale: float,
    text_valid: Lengths,
) -> tuple[torch.Tensor, ...]:
    """Through the means of the others."""
    (bq, bk), rows, dim = mask.block_size, mask.num_rows, q.shape[3]
    dout, lse, delta = (
        F.pad(x, (0, 0, 0, rows * bq - mask.seq_len)).unflatten(2, (rows, bq))
        for x in (dout, lse[..., None], delta[..., None])
    )
    dq, of_blocks = [], q.new_zeros(())
    for part in pooled_rows(q, k, v, mask, tail, scale=scale, text_valid=text_valid):
        own = dout[:, :, part.rows]
        p = (part.scores() - lse[:, :, part.rows]).exp()
        ds = p * (own @ part.value.mT - delta[:, :, part.rows])
        dq.append(ds @ part.key)
        of_blocks = of_blocks + part.to_blocks(torch.cat([ds.mT @ part.q, p.mT @ own], -1))
    of_keys = of_blocks.repeat_interleave(bk, 2)[:, :, : mask.kv_len]
    dk, dv = of_keys.masked_fill(~valid_keys(mask, text_valid).mT, 0.0).split(dim, -1)
    return torch.cat(dq, 2).flatten(2, 3)[:, :, : mask.seq_len] * scale, dk, dv
