"""Gradients of block-sparse attention in Triton, keys, queries and the rest copied by the chip's copy engine.

As `triton_backward`, whose formulas, lists and orders it shares, and what it does with a tile; as in
`triton_tma`, boxes of rows come by descriptors of whole tensors: no addresses, zeros past the end, no fences.
"""

# pyright: reportOperatorIssue=false
# (Triton's annotations leave out the remainder of an int by a `constexpr`)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch_order import mask_arguments, transposed_arguments
from .triton_backward import LOG2_E, Given, strides_of, through_keys, through_queries
from .triton_tma import box, copied, describable, descriptor

# -- kernels -------------------------------------------------------------------------------------------------


@triton.jit
def _over_keys(
    dq, q, dout, top, delta, k_desc, v_desc, b, h, first, last, idx_ptr, tile_ptr, words_ptr,
    scale, hidden_start, hidden_stop,
    DP: tl.constexpr, TK: tl.constexpr, SPLIT: tl.constexpr, TILE_WORDS: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """dQ through the key blocks `idx_ptr[first:last]`, each in `SPLIT` steps of `TK` keys."""
    for i in range(first * SPLIT, last * SPLIT):
        row = (tl.load(idx_ptr + i // SPLIT) * SPLIT + i % SPLIT) * TK
        k, v = box(k_desc, b, h, row, TK, DP), box(v_desc, b, h, row, TK, DP)
        words = words_ptr
        if PARTIAL:
            tile = tl.load(tile_ptr + i // SPLIT).to(tl.int64)
            words = words_ptr + tile * TILE_WORDS + i % SPLIT * (TK // 32)
        start, stop = hidden_start - row, hidden_stop - row
        dq = through_keys(dq, q, dout, top, delta, k, v, words, scale, start, stop, TK, PARTIAL)
    return dq


@triton.jit(do_not_specialize=["seq_len", "num_rows", "heads", "groups_b", "text_start", "text_stop"])
def _queries(
    q_desc, k_desc, v_desc, dout_desc, dq_ptr, top_ptr, delta_ptr, launch_ptr, groups_ptr,
    full_start_ptr, full_count_ptr, full_idx_ptr,
    part_start_ptr, part_count_ptr, part_idx_ptr, part_tile_ptr, words_ptr, text_valid_ptr,
    dq_b, dq_h, dq_s, scale, seq_len, num_rows, heads, groups_b, text_start, text_stop,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """dQ. Grid and arguments as of `triton_backward._queries`, with descriptors of what is read."""
    b = tl.program_id(1)
    item = tl.load(launch_ptr + b.to(tl.int64) * groups_b * num_rows + tl.program_id(0) // (BQ // TQ))
    h = item // num_rows
    block = item % num_rows
    first_row = block * BQ + tl.program_id(0) % (BQ // TQ) * TQ
    rows = first_row + tl.arange(0, TQ)
    exists = rows < seq_len
    q, dout = box(q_desc, b, h, first_row, TQ, DP), box(dout_desc, b, h, first_row, TQ, DP)
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    place = (b64 * heads + h64) * seq_len + rows
    top = tl.load(top_ptr + place, mask=exists, other=float("inf"))
    delta = tl.load(delta_ptr + place, mask=exists, other=0.0)
    words_ptr += (rows - block * BQ) * (BK // 32)
    hidden_start = text_stop
    if text_valid_ptr is not None:
        hidden_start = text_start + tl.load(text_valid_ptr + b).to(tl.int32)
    block += tl.load(groups_ptr + b * groups_b + h) * num_rows
    first_full, first_part = tl.load(full_start_ptr + block), tl.load(part_start_ptr + block)
    last_full = first_full + tl.load(full_count_ptr + block)
    last_part = first_part + tl.load(part_count_ptr + block)

    dq = tl.zeros([TQ, DP], tl.float32)
    dq = _over_keys(
        dq, q, dout, top, delta, k_desc, v_desc, b, h, first_full, last_full, full_idx_ptr, part_tile_ptr,
        words_ptr, scale * LOG2_E, hidden_start, text_stop, DP, TK, BK // TK, BQ * (BK // 32), False,
    )  # fmt: skip
    dq = _over_keys(
        dq, q, dout, top, delta, k_desc, v_desc, b, h, first_part, last_part, part_idx_ptr, part_tile_ptr,
        words_ptr, scale * LOG2_E, hidden_start, text_stop, DP, TK, BK // TK, BQ * (BK // 32), True,
    )  # fmt: skip
    d = tl.arange(0, DP)
    dq_tile = dq_ptr + (b64 * dq_b + h64 * dq_h) * ALIGN
    dq_tile += rows.to(tl.int64)[:, None] * (dq_s * ALIGN) + d[None, :]
    tl.store(dq_tile, (dq * scale).to(dq_ptr.dtype.element_ty), mask=exists[:, None] & (d < D)[None, :])


@triton.jit
def _over_queries(
    dk, dv, k, v, q_desc, dout_desc, b, h, top_ptr, delta_ptr, first, last, idx_ptr, tile_ptr, words_ptr,
    visible, scale, seq_len,
    DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """dK and dV through the query blocks `idx_ptr[first:last]`, each in BQ / TQ steps of `TQ` queries."""
    cols = tl.arange(0, TQ)
    for i in range(first * (BQ // TQ), last * (BQ // TQ)):
        in_block = i % (BQ // TQ) * TQ
        start = tl.load(idx_ptr + i // (BQ // TQ)) * BQ + in_block
        q, dout = box(q_desc, b, h, start, TQ, DP), box(dout_desc, b, h, start, TQ, DP)
        row = tl.minimum(start + cols, seq_len - 1)  # what is past the end weighs nothing
        top = tl.where(start + cols < seq_len, tl.load(top_ptr + row), float("inf"))
        delta = tl.load(delta_ptr + row)
        words = words_ptr + in_block * (BK // 32) + cols * (BK // 32)
        if PARTIAL:
            words += tl.load(tile_ptr + i // (BQ // TQ)).to(tl.int64) * (BQ * (BK // 32))
        dk, dv = through_queries(dk, dv, k, v, q, dout, top, delta, words, visible, scale, TK, PARTIAL)
    return dk, dv


@triton.jit(
    do_not_specialize=["seq_len", "kv_len", "num_cols", "heads", "groups_b", "text_start", "text_stop"]
)
def _keys(
    q_desc, k_desc, v_desc, dout_desc, dk_ptr, dv_ptr, top_ptr, delta_ptr, launch_ptr, groups_ptr,
    full_start_ptr, full_count_ptr, full_idx_ptr,
    part_start_ptr, part_count_ptr, part_idx_ptr, part_tile_ptr, words_ptr, text_valid_ptr,
    dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    scale, seq_len, kv_len, num_cols, heads, groups_b, text_start, text_stop,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """dK and dV. Grid and arguments as of `triton_backward._keys`, with descriptors of what is read."""
    b = tl.program_id(1)
    item = tl.load(launch_ptr + b.to(tl.int64) * groups_b * num_cols + tl.program_id(0) // (BK // TK))
    h = item // num_cols
    block = item % num_cols
    part = tl.program_id(0) % (BK // TK)
    first_key = block * BK + part * TK
    keys = first_key + tl.arange(0, TK)
    k, v = box(k_desc, b, h, first_key, TK, DP), box(v_desc, b, h, first_key, TK, DP)
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    top_ptr += (b64 * heads + h64) * seq_len
    delta_ptr += (b64 * heads + h64) * seq_len
    words_ptr += part * (TK // 32)
    visible = keys < kv_len
    if text_valid_ptr is not None:
        visible &= (keys < text_start + tl.load(text_valid_ptr + b).to(tl.int32)) | (keys >= text_stop)
    block += tl.load(groups_ptr + b * groups_b + h) * num_cols
    first_full, first_part = tl.load(full_start_ptr + block), tl.load(part_start_ptr + block)
    last_full = first_full + tl.load(full_count_ptr + block)
    last_part = first_part + tl.load(part_count_ptr + block)

    dk = tl.zeros([TK, DP], tl.float32)
    dv = tl.zeros([TK, DP], tl.float32)
    dk, dv = _over_queries(
        dk, dv, k, v, q_desc, dout_desc, b, h, top_ptr, delta_ptr, first_full, last_full, full_idx_ptr,
        part_tile_ptr, words_ptr, visible, scale * LOG2_E, seq_len, DP, BQ, BK, TQ, TK, False,
    )  # fmt: skip
    dk, dv = _over_queries(
        dk, dv, k, v, q_desc, dout_desc, b, h, top_ptr, delta_ptr, first_part, last_part, part_idx_ptr,
        part_tile_ptr, words_ptr, visible, scale * LOG2_E, seq_len, DP, BQ, BK, TQ, TK, True,
    )  # fmt: skip
    d = tl.arange(0, DP)
    inside = (keys < kv_len)[:, None] & (d < D)[None, :]
    keys64 = keys.to(tl.int64)[:, None]
    dk_tile = dk_ptr + (b64 * dk_b + h64 * dk_h) * ALIGN + (keys64 * (dk_s * ALIGN) + d[None, :])
    dv_tile = dv_ptr + (b64 * dv_b + h64 * dv_h) * ALIGN + (keys64 * (dv_s * ALIGN) + d[None, :])
    tl.store(dk_tile, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_tile, dv.to(dv_ptr.dtype.element_ty), mask=inside)


# -- launch --------------------------------------------------------------------------------------------------


def dq_launch(given: Given, dq: torch.Tensor, options: dict[str, int]) -> tuple:
    """As `triton_backward.dq_launch`; copies what cannot be described."""
    mask, (lists, numbers), (strides, align) = given.mask, given.lists(mask_arguments), strides_of(dq)
    grid = (lists[0].shape[1] * (mask.block_size[0] // options["TQ"]), given.q.shape[0])
    args = (
        *_descriptors(given, options), dq, given.top, given.delta, *lists, given.text_valid, *strides,
        given.scale, given.q.shape[2], mask.num_rows, *numbers,
    )  # fmt: skip
    return _queries, grid, args, options | given.sizes | {"ALIGN": align}


def dkv_launch(given: Given, dk: torch.Tensor, dv: torch.Tensor, options: dict[str, int]) -> tuple:
    """As `triton_backward.dkv_launch`; copies what cannot be described."""
    mask, (strides, align) = given.mask, strides_of(dk, dv)
    lists, numbers = given.lists(transposed_arguments)
    grid = (lists[0].shape[1] * (mask.block_size[1] // options["TK"]), given.q.shape[0])
    args = (
        *_descriptors(given, options), dk, dv, given.top, given.delta, *lists, given.text_valid, *strides,
        given.scale, given.q.shape[2], mask.kv_len, mask.num_cols, *numbers,
    )  # fmt: skip
    return _keys, grid, args, options | given.sizes | {"ALIGN": align}


def _descriptors(given: Given, options: dict[str, int]) -> tuple:
    """Of q, k, v and dout, in boxes of a tile."""
    rows, keys, dim = options["TQ"], options["TK"], given.sizes["DP"]
    boxes = ((given.q, rows), (given.k, keys), (given.v, keys), (given.dout, rows))
    return tuple(descriptor(x if describable(x) else copied(x), n, dim) for x, n in boxes)
