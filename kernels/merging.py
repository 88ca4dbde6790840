"""Attention over parts of the keys, joined to what it is over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def merge(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over disjoint sets of keys, joined to attention over all of them; differentiable.

    With weights w_i = exp(lse_i - lse), lse = log sum_i exp(lse_i), the output is sum_i w_i out_i: exact up
    to rounding, since each part is a softmax over its own keys (Milakov and Gimelshein 2018).

    Args:
        outs: the output over each part (batch, heads, seq, head_dim), of one shape and dtype.
        lses: the log-sum-exp of each part's scaled scores (batch, heads, seq), natural logarithm; -inf where
            a row attends to nothing in that part.

    Returns:
        out in the dtype of the parts, and lse; rows that attend to nothing in any part: out 0, lse -inf.

    Raises:
        ValueError: no parts, not as many outputs as log-sum-exps, or shapes that do not fit.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"`outs` and `lses` must be of the same parts, got {len(outs)} and {len(lses)}")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"parts must have outputs of one shape and an lse for each row, got {tuple(out.shape)} and "
                f"{tuple(lse.shape)} beside {tuple(outs[0].shape)}"
            )
    parts = torch.stack(list(lses))
    nothing = (parts == -math.inf).all(0)
    lse = parts.masked_fill(nothing, 0.0).logsumexp(0)
    weights = (parts - lse).exp()  # 0 for a part in which a row attends to nothing
    joined = sum(w[..., None] * out for w, out in zip(weights, outs, strict=True))
    return joined.to(outs[0].dtype), lse.masked_fill(nothing, -math.inf)
