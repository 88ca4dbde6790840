"""Gradients of block-sparse attention from its output and log-sum-exp: what a backend that has them computes.

With p_ij = exp(scale q_i.k_j - lse_i) for the keys j that query i attends to, and gradients dout and dlse,

    dv_j = sum_i p_ij dout_i
    ds_ij = p_ij (dout_i.v_j - delta_i),    delta_i = dout_i.out_i - dlse_i
    dq_i = scale sum_j ds_ij k_j,    dk_j = scale sum_i ds_ij q_i

as FlashAttention-2 has them (Dao 2023): scores are computed again and never kept. With a tail out and lse are
those over all keys, so that its pooled keys follow the same formulas; what the means get goes to their keys
in equal parts. `native` does all of it in compiled code, `triton` does the tail by `of_tail`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dit_accel.masks.block_mask import BlockMask

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
