"""Block-sparse attention, the specification: dense attention under the mask's bits.

For query i with the set of keys J(i):

    lse_i = log sum_{j in J(i)} exp(scale q_i.k_j),    out_i = sum_{j in J(i)} exp(scale q_i.k_j - lse_i) v_j

A row with empty J(i) has out_i = 0 and lse_i = -inf.
"""

from __future__ import annotations

import math

import torch

from dit_accel.blockmask import BlockMask


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    scale: float,
    text_valid: torch.Tensor | None = None,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_sparse_attention` on the dense mask, in fp32 (float64 for float64 inputs). Needs S x S memory.

    Args:
        q: (batch, heads, seq_len, head_dim); k, v: (batch, heads, kv_len, head_dim); all in kernel order.
        text_valid: (batch,) valid text tokens of each sample, or None for all.

    Returns:
        out like q, and lse (batch, heads, seq_len) in fp32 (float64 for float64 inputs).
    """
    allowed = dense_mask(mask, q.shape[1], text_valid)
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(exact) @ k.to(exact).mT * scale).masked_fill(~allowed, -math.inf)
    nothing = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0.0)
    lse = scores.logsumexp(-1, keepdim=True)
    out = (scores - lse).exp() @ v.to(exact)
    return out.masked_fill(nothing, 0.0).to(q.dtype), lse.masked_fill(nothing, -math.inf).squeeze(-1)


def dense_mask(mask: BlockMask, heads: int, text_valid: torch.Tensor | None = None) -> torch.Tensor:
    """What each query attends to: bool, broadcastable to (batch, heads, seq_len, kv_len), in kernel order."""
    allowed = mask.to_kernel_mask()[mask.group_of_heads(heads).long()][None]
    if text_valid is None:
        return allowed
    start, stop = mask.text
    key = torch.arange(mask.kv_len, device=mask.device)
    return allowed & ~((key >= start + text_valid.view(-1, 1, 1, 1)) & (key < stop))
