"""Sparse attention as a function: q, k, v and a pattern, for models and frameworks outside of diffusers."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from dit_accel import kernels
from dit_accel.arguments import shown
from dit_accel.masks.layout import TokenLayout

from .call import AttentionCall, LayerAttention, ModelAttention
from .layer_masks import LayerMasks, layer_attention

if TYPE_CHECKING:
    from dit_accel.patterns import Pattern


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    layout: TokenLayout,
    *,
    scale: float | None = None,
    text_valid: torch.Tensor | None = None,
    quantization: str | None = None,
    tail: str | None = None,
    backend: str = "auto",
    step: int = 0,
    sigma: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention under a pattern, as accelerated layers of diffusers' transformers compute it.

    Tokens stand and stay in the model's own order. What a pattern makes of a layout is built at the first
    call and reused, so that a loop over layers and steps pays for it once. In code under `torch.compile` that
    is outside of its graphs, which break there: `fullgraph=True` is not possible.

    Args:
        q, k, v: (B, H, S, D) with S = `layout.seq_len`, as for `kernels.block_sparse_attention`.
        pattern: any pattern of `dit_accel.patterns`, or one of your own.
        layout: where visual and text tokens are.
        scale: factor on the scores, D^-0.5 unless given.
        text_valid: how many text tokens of each sample are real, integers (B,); None: all.
        quantization, backend: as for `kernels.block_sparse_attention`.
        tail: `"pooled"`: key blocks that a query's block does not compute contribute by their means
            (`kernels.block_sparse_attention`); None: not at all.
        step, sigma: sampler step and the noise level at which it begins, from 1 to 0, for patterns that
            change with them.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        out (B, H, S, D) in q's dtype; with `return_lse` also lse (B, H, S) in natural logarithm, fp32 (of
        fp64 inputs fp64).

    Raises:
        ValueError, TypeError: tensors that do not fit each other, the layout or the pattern.
        UnavailableError: what was asked for cannot run here; the message says why.
    """
    check_tail(tail, pattern)
    check_format(quantization, pattern)
    if q.ndim != 4 or q.shape[2] != layout.seq_len:
        raise ValueError(
            f"`q` must have shape (batch, heads, seq, head_dim) with the {layout.seq_len} tokens of the "
            f"layout, got {tuple(q.shape)}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(
                f"`{name}` must have the shape of `q`, {tuple(q.shape)}, got {tuple(tensor.shape)}"
            )
    lengths = kernels.checked_text_valid(text_valid, q, layout.text_len, "layout")
    heads = tuple(pattern.for_head(None, head).at_step(step, sigma) for head in range(q.shape[1]))
    layer = ModelAttention()
    if return_lse or quantization is not None or any(one.sparse for one in heads):
        layer = _outside_graphs(heads, layout, q.device)
    if isinstance(text_valid, torch.Tensor) and text_valid.device == q.device:
        lengths = text_valid  # the same tensor in every layer, whose values kernels wait for once
    call = AttentionCall(
        q,
        k,
        v,
        layout,
        dense=_dense,
        text_valid=lengths,
        scale=scale,
        step=step,
        backend=backend,
        quantization=quantization,
        tail=tail,
    )
    return layer.with_lse(call) if return_lse else layer(call)


def check_tail(tail: str | None, pattern: Pattern) -> None:
    """Raise ValueError unless it is a tail, or None, and the pattern's hidden keys may show through it."""
    if tail not in kernels.TAILS:
        raise ValueError(f"`tail` must be 'pooled' or None, got {shown(tail)}")
    if tail is not None and any(variant.hides for variant in pattern.variants):
        raise ValueError(
            f"{pattern} hides keys on purpose, not to save time, and `tail` would bring them back; use "
            "tail=None for it"
        )
    rest = next((variant.rest for variant in pattern.variants if variant.rest), "")
    if tail is not None and rest:
        raise ValueError(
            f"{pattern} has {rest} for what it leaves out, and a tail would count that twice; use "
            "tail=None with it"
        )
    if tail is not None and pattern.own_tail:
        raise ValueError(f"{pattern} says itself which heads have a tail; use tail=None with it")


def check_format(quantization: str | None, pattern: Pattern) -> None:
    """Raise ValueError if it is a numeric format, and the pattern is not what kernels compute."""
    if quantization is not None and not all(variant.blocks for variant in pattern.variants):
        raise ValueError(
            f"{pattern} is computed without the kernels that `quantization` is for, got {quantization!r}; "
            "use quantization=None with it"
        )


@torch.compiler.disable
def _outside_graphs(*arguments) -> LayerAttention:
    return _of(*arguments)


@lru_cache(maxsize=64)
def _of(heads: tuple[Pattern, ...], layout: TokenLayout, device: torch.device) -> LayerAttention:
    """What a layer with these heads computes, in the cheapest block size."""
    sizes = kernels.block_sizes(device)
    with torch.inference_mode(False):  # what stays must be usable under autograd later
        made = {size: layer_attention(heads, LayerMasks(layout, "auto", size, device)) for size in sizes}
    return made[min(made, key=lambda size: made[size].block_density * sizes[size])]


def _dense(call: AttentionCall) -> torch.Tensor:
    hidden = call.hidden_keys()
    mask = None if hidden is None else ~hidden[:, None, None]
    return F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=mask, scale=call.scale)
