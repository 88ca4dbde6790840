"""Block-sparse attention: one public function over interchangeable backends."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from dit_accel.errors import UnavailableError
from dit_accel.masks.block_mask import BlockMask

from . import custom_op as opaque
from .backends import choose, joined, log_choice
from .backward import WithGradients
from .problem import Backend, Problem
from .validation import check_tensors, checked_pv_threshold, checked_scale, checked_text_valid


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    text_valid: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    quantization: str | None = None,
    tail: str | None = None,
    pv_threshold: float | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query to the keys that `mask` names, exact to the element.

    Args:
        q: (batch, heads, seq_len, head_dim) in kernel order (`mask.order`), fp16, bf16, fp32 or, with the
            backends that take it, float64; any strides, head_dim up to 256.
        k, v: (batch, heads, kv_len, head_dim), same dtype and device.
        mask: which keys; on the same device as q.
        scale: factor on the scores, a finite number, head_dim^-0.5 unless given.
        text_valid: number of valid text tokens of each sample, for padded text: any integers (batch,) between
            0 and the mask's text length; None: all. A tensor on a GPU is waited for when it is first seen.
        return_lse: also return the log-sum-exp of the scaled scores.
        backend: `"auto"`, the fastest that can run here, or the name of one: `"triton"`, `"triton-tma"` (keys
            by the copy engine of Hopper and Blackwell), `"triton-gluon"` (Hopper, warps that share out the
            work), `"native"` (compiled for this CPU), `"gather"` (plain PyTorch), `"flex"`, `"fa4"`
            (FlashAttention-4, on masks of its block sizes), `"reference"`; `support_table()` says what runs
            where. Only `"auto"` chooses; what is named runs or raises.
        quantization: numeric format in which q, k, v are multiplied (`kernels.block_sparse.formats`): None,
            their own; `"int8"`: q and k in 8 bits; `"int8-fp8"`, `"int8-int8"`, `"int8-int4"`: probabilities
            and v as well, in fp8, 8 or 4 bits. No gradients.
        tail: `"pooled"`: keys in blocks that a query's block does not compute contribute by their means, a
            term for every 256 keys, or 64 near what it computes, and computed blocks are computed whole
            (`kernels.block_sparse.tail`);
            None: they contribute nothing.
        pv_threshold: SpargeAttn's: the values of a block of keys are not added to the result where no score
            of a piece of the query block is within 2^-pv_threshold of the weight of its row's largest so far
            (`reference.skipped`); a number above 0, 50 as published. None: all are added.

    Returns:
        out (batch, heads, seq_len, head_dim) in q's dtype; with `return_lse` also lse (batch, heads, seq_len)
        in natural logarithm, fp32 (float64 for float64 inputs). Rows that attend nothing: out 0, lse -inf,
        whatever k and v hold. Rows that attend to what is not a number are not numbers.

    Raises:
        ValueError, TypeError: tensors that do not fit each other or the mask, an unknown backend or tail, or
            a `pv_threshold` that is no number above 0.
        UnavailableError: a backend that cannot run with these inputs; the message says why.
    """
    check_tensors(q, k, v, mask)
    text_valid = checked_text_valid(text_valid, q, mask.text[1] - mask.text[0])
    scale = checked_scale(scale, q.shape[3])
    asked = {"quantization": quantization, "return_lse": return_lse, "tail": tail}
    problem = Problem.of(q, k, v, mask, **asked, pv_threshold=checked_pv_threshold(pv_threshold))
    chosen, reasons = choose(backend, problem)
    if chosen is None:
        raise UnavailableError(f"backend {backend!r} cannot run here: {joined(reasons)}")
    attend, compiling = chosen.compute, torch.compiler.is_compiling()
    if backend == "auto" and not compiling:
        log_choice(chosen.name, q.device.type, q.dtype, reasons[0] if reasons else None)
    recomputed = chosen.recomputes(problem)
    if compiling and not chosen.is_looked_into(problem) and (recomputed or not problem.requires_grad):
        attend = partial(opaque.attend, chosen.name)  # otherwise the graph breaks
    elif recomputed:
        attend = partial(_with_gradients, chosen)
    # each backend says itself in what it multiplies
    mixed, kind = torch.is_autocast_enabled(q.device.type), q.device.type
    with torch.autocast(kind, enabled=False) if mixed else nullcontext():
        out, lse = attend(q, k, v, mask, problem, scale=scale, text_valid=text_valid)
    return out if lse is None or not return_lse else (out, lse)


def _with_gradients(
    backend: Backend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    problem: Problem,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return WithGradients.apply(q, k, v, backend, mask, problem, options)
