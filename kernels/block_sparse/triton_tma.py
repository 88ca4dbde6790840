"""Block-sparse attention, forward, in Triton: keys and values are copied by the chip's copy engine (TMA).

As `triton_forward`, whose formulas, lists and order of blocks it shares; other is how a block reaches the
tensor cores. A descriptor of the whole tensor lets the copy engine of Hopper and Blackwell fetch a box of
rows at any row of the block list: no address is computed by the threads, what lies past the last key or
past head_dim arrives as zeros, and no fence is needed between the copy and the multiplication.

It computes 16-bit attention, and the formats that `tma` names; others and thresholds are for the kernel with
pointers.
"""

# pyright: reportOperatorIssue=false
# (Triton's annotations leave out the remainder of an int by a `constexpr`)

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_accel.masks.block_mask import BlockMask

from .launch_order import mask_arguments
from .triton_configs import gpu, tma_config
from .triton_configs import padded_head_dim as held_head_dim
from .triton_forward import (
    INTERPRETED,
    LAUNCH_OPTIONS,
    LN_2,
    LOWEST,
    outputs,
    powers,
    rounded,
    shown,
    with_positive_scale,
)

ALIGNED = 16  # bytes: of the first number of a tensor, and of every stride


# -- kernel --------------------------------------------------------------------------------------------------


@triton.jit
def box(desc, b, h, row, ROWS: tl.constexpr, DP: tl.constexpr):
    """Rows from `row` on of one head: [ROWS, DP]."""
    return desc.load([b, h, row, 0]).reshape([ROWS, DP])


@triton.jit
def _stream(
    acc, m, total, q, k_desc, v_desc, b, h, first, last, idx_ptr, tile_ptr, words_ptr,
    scale, k_scale_ptr, hidden_start, hidden_stop,
    DP: tl.constexpr, TK: tl.constexpr, SPLIT: tl.constexpr, TILE_WORDS: tl.constexpr,
    GROUP: tl.constexpr, WEIGHTS: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Attend the key blocks `idx_ptr[first:last]`, each in `SPLIT` steps of `TK` keys.

    `scale` is one number; with a `GROUP` of keys that share one of `k_scale_ptr`, one of each query.
    With `WEIGHTS`, the largest of a group's, V is transposed.
    """
    for i in range(first * SPLIT, last * SPLIT):
        start = (tl.load(idx_ptr + i // SPLIT) * SPLIT + i % SPLIT) * TK
        k = box(k_desc, b, h, start, TK, DP)
        if WEIGHTS:  # so early, it takes fewer instructions
            v = v_desc.load([b, h, 0, start]).reshape([DP, TK])
        s = tl.dot(q, tl.trans(k))  # [TQ, TK]
        factor = scale
        if GROUP:
            s = s.to(tl.float32)
            factor = scale * tl.load(k_scale_ptr + start // GROUP)  # [TQ]
            if PARTIAL:  # a scale that is not a number must not reach what is hidden
                s *= factor[:, None]
                factor = 1.0
        if PARTIAL:
            tile = tl.load(tile_ptr + i // SPLIT).to(tl.int64)
            words = words_ptr + tile * TILE_WORDS + i % SPLIT * (TK // 32)
            s = tl.where(shown(words, hidden_start - start, hidden_stop - start, TK), s, float("-inf"))
        top = tl.max(s, 1) * factor  # [TQ]
        m_new = tl.maximum(m, top)
        alpha = tl.exp2(m - m_new)
        if WEIGHTS:
            codes, p, share = rounded(s, factor, top, m_new, WEIGHTS, v_desc.dtype, PARTIAL)
            total = total * alpha + tl.sum(p, 1) * share
            acc *= alpha[:, None]
            acc += tl.dot(codes, tl.trans(v)).to(tl.float32) * share[:, None]  # [TQ, DP]
        else:
            p = powers(s, factor, m_new, GROUP and PARTIAL)
            total = total * alpha + tl.sum(p, 1)
            v = box(v_desc, b, h, start, TK, DP)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])  # [TQ, DP]
        m = m_new
    return acc, m, total


@triton.jit(do_not_specialize=["seq_len", "num_rows", "heads", "groups_b", "text_start", "text_stop"])
def _forward(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, launch_ptr, groups_ptr,
    full_start_ptr, full_count_ptr, full_idx_ptr,
    part_start_ptr, part_count_ptr, part_idx_ptr, part_tile_ptr, words_ptr, text_valid_ptr,
    q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, shift_ptr,
    out_b, out_h, out_s, scale, seq_len, num_rows, heads, groups_b, text_start, text_stop,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    ALIGN: tl.constexpr, GROUP: tl.constexpr, WEIGHTS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid and arguments as in `triton_forward`, with descriptors of q, k and v, [1, 1, rows, DP] a box."""
    b = tl.program_id(1)
    item = tl.load(launch_ptr + b.to(tl.int64) * groups_b * num_rows + tl.program_id(0) // (BQ // TQ))
    h = item // num_rows
    block = item % num_rows
    in_block = tl.program_id(0) % (BQ // TQ) * TQ + tl.arange(0, TQ)
    rows = block * BQ + in_block
    d = tl.arange(0, DP)
    q = box(q_desc, b, h, block * BQ + tl.program_id(0) % (BQ // TQ) * TQ, TQ, DP)
    if GROUP:
        head = b.to(tl.int64) * heads + h
        scale = tl.load(q_scale_ptr + head * QUERIES + rows)  # [TQ]
        k_scale_ptr += head * (KEYS // GROUP)
    words_ptr += in_block * (BK // 32)
    hidden_start = text_stop
    if text_valid_ptr is not None:
        hidden_start = text_start + tl.load(text_valid_ptr + b).to(tl.int32)
    block += tl.load(groups_ptr + b * groups_b + h) * num_rows
    first_full, first_part = tl.load(full_start_ptr + block), tl.load(part_start_ptr + block)
    last_full = first_full + tl.load(full_count_ptr + block)
    last_part = first_part + tl.load(part_count_ptr + block)

    m = tl.full([TQ], LOWEST, tl.float32)
    total = tl.zeros([TQ], tl.float32)
    acc = tl.zeros([TQ, DP], tl.float32)
    acc, m, total = _stream(
        acc, m, total, q, k_desc, v_desc, b, h, first_full, last_full, full_idx_ptr, part_tile_ptr,
        words_ptr, scale, k_scale_ptr, hidden_start, text_stop,
        DP, TK, BK // TK, BQ * (BK // 32), GROUP, WEIGHTS, False,
    )  # fmt: skip
    acc, m, total = _stream(
        acc, m, total, q, k_desc, v_desc, b, h, first_part, last_part, part_idx_ptr, part_tile_ptr,
        words_ptr, scale, k_scale_ptr, hidden_start, text_stop,
        DP, TK, BK // TK, BQ * (BK // 32), GROUP, WEIGHTS, True,
    )  # fmt: skip

    nothing = total == 0.0  # attended, and acc may be 0 * NaN
    out = acc / tl.where(nothing, 1.0, total)[:, None]
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    if WEIGHTS:
        channel = (b64 * heads + h64) * DP + d
        out = out * tl.load(v_scale_ptr + channel)[None, :] + tl.load(v_mean_ptr + channel)[None, :]
    out = tl.where(nothing[:, None], 0.0, out)
    tile = rows.to(tl.int64)[:, None] * (out_s * ALIGN) + d[None, :]
    inside = (rows < seq_len)[:, None] & (d < D)[None, :]
    out_tile = out_ptr + (b64 * out_b + h64 * out_h) * ALIGN + tile
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=inside)
    lse = m + tl.log2(total)
    if GROUP:
        lse += tl.load(shift_ptr + (b64 * heads + h64) * seq_len + rows, mask=rows < seq_len, other=0.0)
    lse = tl.where(nothing, float("-inf"), lse * LN_2)
    tl.store(lse_ptr + (b64 * heads + h64) * seq_len + rows, lse, mask=rows < seq_len)


# -- launch --------------------------------------------------------------------------------------------------


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    scale: float,
    text_valid: torch.Tensor | None,
    options: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `triton_forward.attention`; `options` are a launch's, those of `tma_config` unless given.

    Tensors that a descriptor cannot describe are copied first.
    """
    if q.numel() == 0:
        return outputs(q)
    q, scale = with_positive_scale(q, scale)
    if INTERPRETED and q.dtype == torch.bfloat16:  # Triton's interpreter would multiply the bit patterns
        wide = (x.float() for x in (q, k, v))
        out, lse = attention(*wide, mask, scale=scale, text_valid=text_valid, options=options)
        return out.to(q.dtype), lse
    if options is None:
        device = (9, 0) if INTERPRETED else gpu(q.device)
        options = tma_config(q.shape[3], mask.block_size, device)
    return launched(_forward, launch_arguments, q, k, v, mask, scale, text_valid, options)


def launched(
    kernel: Any,
    arguments: Callable[..., tuple[Any, Any, Any]],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    scale: float,
    text_valid: torch.Tensor | None,
    options: dict[str, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel that reads q, k and v by descriptors computes of a mask, as of `attention`.

    Args:
        kernel, arguments: the kernel, and the `launch_arguments` of it.
    """
    q, k, v = (x if describable(x) else copied(x) for x in (q, k, v))
    out, lse = outputs(q)
    grid, args, chosen = arguments(
        q, k, v, out, lse, mask_arguments(mask, *q.shape[:2]), text_valid, scale, mask.block_size, mask.text,
        options,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        kernel[grid](*args, **chosen, **LAUNCH_OPTIONS)
    return out, lse


def describable(x: torch.Tensor) -> bool:
    """Whether the copy engine can read x: rows contiguous, whole multiples of 16 bytes apart, none shared."""
    apart = (s for n, s in zip(x.shape[:3], x.stride()[:3], strict=True) if n > 1)
    strides = [stride * x.element_size() for stride in apart]
    return (
        x.stride(3) == 1
        and x.data_ptr() % ALIGNED == 0
        and all(0 < stride < 2**40 and stride % ALIGNED == 0 for stride in strides)
    )


def copied(x: torch.Tensor) -> torch.Tensor:
    """x in memory that the copy engine can read: its rows begin at whole multiples of 16 bytes."""
    step = ALIGNED // x.element_size()
    room = x.new_empty(*x.shape[:3], -(-x.shape[3] // step) * step)
    return room[..., : x.shape[3]].copy_(x)


def described(x: torch.Tensor, rows: int, dim: int) -> tuple[torch.Tensor, list[int], list[int], list[int]]:
    """x, its shape and strides, and a box of `rows` rows of one head, [1, 1, rows, dim]: a descriptor's."""
    step = ALIGNED // x.element_size()
    # of what there is one of, the stride is not looked at, but must be one that could be
    strides = [step if n == 1 else s for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return x, list(x.shape), [*strides, 1], [1, 1, rows, dim]


def descriptor(x: torch.Tensor, rows: int, dim: int) -> TensorDescriptor:
    """x as the copy engine knows it, in boxes as of `described`."""
    return TensorDescriptor(*described(x, rows, dim))


def launch_arguments(
    q, k, v, out, lse, mask, text_valid, scale, block_size, text, options, quantized=None, weights=None
):  # fmt: skip
    """Grid, positional and keyword arguments of `_forward`, as in `triton_forward`."""
    order, groups = mask[:2]
    (batch, heads, seq_len, head_dim), bq, dim = q.shape, block_size[0], held_head_dim(q.shape[3])
    align = 8 if all(stride % 8 == 0 for stride in out.stride()[:3]) else 1
    extra, sizes = [None] * 5, {"GROUP": None, "WEIGHTS": None, "QUERIES": None, "KEYS": None}
    if quantized is not None:
        q, k, v = quantized.q, quantized.k, quantized.v
        extra = [getattr(quantized, name) for name in ("q_scale", "k_scale", "v_scale", "v_mean", "shift")]
        sizes = {"GROUP": quantized.group, "WEIGHTS": weights, "QUERIES": q.shape[2], "KEYS": k.shape[2]}
    boxes = (options["TK"], dim) if weights is None else (dim, options["TK"])  # codes of values: transposed
    args = (
        descriptor(q, options["TQ"], dim), descriptor(k, options["TK"], dim), descriptor(v, *boxes),
        out, lse, *mask, text_valid, *extra, *(stride // align for stride in out.stride()[:3]),
        scale * math.log2(math.e), seq_len, -(-seq_len // bq), heads, heads if len(groups) > 1 else 0, *text,
    )  # fmt: skip
    sizes |= {"D": head_dim, "DP": dim, "BQ": bq, "BK": block_size[1], "ALIGN": align}
    return (order.shape[1] * (bq // options["TQ"]), batch), args, options | sizes
