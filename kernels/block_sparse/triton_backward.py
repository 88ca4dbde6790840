"""Gradients of block-sparse attention in Triton, from its output and log-sum-exp.

With p_ij = exp(scale q_i.k_j - lse_i) for the keys j that query i attends to, and gradients dout and dlse,

    dv_j = sum_i p_ij dout_i
    ds_ij = p_ij (dout_i.v_j - delta_i),    delta_i = dout_i.out_i - dlse_i
    dq_i = scale sum_j ds_ij k_j,    dk_j = scale sum_i ds_ij q_i

as FlashAttention-2 has them (Dao, 2023, arXiv:2307.08691). Three kernels: the first makes delta and lse in
base 2, the second dQ of a tile of queries over the blocks that the mask lists for it, the third dK and dV of
a tile of keys over the transposed lists. Both compute the scores again and keep none; nobody adds to what
another writes, so that results repeat to the bit. Scores of the third are held transposed, P^T and dS^T being
the left operands of its products, which tensor cores read from registers. All sums are fp32, and P and dS are
rounded to the dtype of the inputs before they are multiplied.

`triton_gradients` launches them, or those of `triton_tma_backward` in their place.
"""

# pyright: reportOperatorIssue=false
# (Triton's annotations leave out the remainder of an int by a `constexpr`)

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dit_accel.masks.block_mask import BlockMask

from .launch_order import mask_arguments, transposed_arguments
from .problem import Lengths
from .triton_configs import padded_head_dim
from .triton_forward import shown

PREPARED_ROWS = 32  # of a program of `_prepare`
LOG2_E = tl.constexpr(math.log2(math.e))

# -- kernels -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seq_len", "heads"])
def _prepare(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, top_ptr, delta_ptr,
    out_b, out_h, out_s, dout_b, dout_h, dout_s, seq_len, heads,
    D: tl.constexpr, DP: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (heads * rows / ROWS, batch): delta, and lse in base 2, infinite where a row attends nothing."""
    b, h = tl.program_id(1).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    rows = (tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, DP)
    exists = rows < seq_len
    inside = exists[:, None] & (d < D)[None, :]
    out_tile = out_ptr + (b * out_b + h * out_h) * ALIGN + (rows[:, None] * (out_s * ALIGN) + d[None, :])
    dout_tile = dout_ptr + (b * dout_b + h * dout_h) * ALIGN + (rows[:, None] * (dout_s * ALIGN) + d[None, :])
    out = tl.load(out_tile, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_tile, mask=inside, other=0.0).to(tl.float32)
    place = (b * heads + h) * seq_len + rows
    lse = tl.load(lse_ptr + place, mask=exists, other=0.0)
    delta = tl.sum(out * dout, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + place, mask=exists, other=0.0).to(tl.float32)
    nothing = lse == float("-inf")
    tl.store(delta_ptr + place, tl.where(nothing, 0.0, delta), mask=exists)
    tl.store(top_ptr + place, tl.where(nothing, float("inf"), lse * LOG2_E), mask=exists)


@triton.jit
def through_keys(
    dq, q, dout, top, delta, k, v, words, scale, hidden_start, hidden_stop,
    TK: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """dQ with what comes through `TK` keys, of which bits from `words` on show some if `PARTIAL`."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [TQ, TK]
    p = tl.exp2(tl.fma(s, scale, -top[:, None]))
    if PARTIAL:
        p = tl.where(shown(words, hidden_start, hidden_stop, TK), p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # [TQ, DP]


@triton.jit
def through_queries(
    dk, dv, k, v, q, dout, top, delta, words, visible, scale, TK: tl.constexpr, PARTIAL: tl.constexpr
):
    """dK and dV with what comes through some queries, to the `TK` keys that are `visible`, as of the bits."""
    tl.static_assert(TK % 32 == 0, "a word has the bits of 32 keys")
    s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [TK, TQ]
    p = tl.exp2(tl.fma(s, scale, -top[None, :]))
    if PARTIAL:
        keys = tl.arange(0, TK)
        word = tl.load(words)[None, :]  # [1, TQ]
        for j in tl.static_range(32, TK, 32):  # pyright: ignore[reportGeneralTypeIssues]
            word = tl.where(keys[:, None] < j, word, tl.load(words + j // 32)[None, :])  # [TK, TQ]
        bits = tl.where(visible, 1 << (keys % 32), 0)[:, None]
        p = tl.where((word & bits) != 0, p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")  # [TK, DP]
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit
def _over_keys(
    dq, q, dout, top, delta, k_ptr, v_ptr, k_s, v_s, first, last, idx_ptr, tile_ptr, words_ptr,
    scale, kv_len, hidden_start, hidden_stop,
    D: tl.constexpr, DP: tl.constexpr, TK: tl.constexpr, SPLIT: tl.constexpr, TILE_WORDS: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """dQ through the key blocks `idx_ptr[first:last]`, each in `SPLIT` steps of `TK` keys."""
    cols = tl.arange(0, TK)
    d = tl.arange(0, DP)
    k_tile = k_ptr + (cols[:, None] * k_s + d[None, :])
    v_tile = v_ptr + (cols[:, None] * v_s + d[None, :])
    for i in range(first * SPLIT, last * SPLIT):
        start = (tl.load(idx_ptr + i // SPLIT) * SPLIT + i % SPLIT) * TK
        start64 = start.to(tl.int64)
        inside = None
        if D < DP:
            inside = d[None, :] < D
        if PARTIAL:
            within = cols[:, None] < kv_len - start
            inside = within if inside is None else inside & within
        k = tl.load(k_tile + start64 * k_s, mask=inside, other=None if inside is None else 0.0)  # [TK, DP]
        v = tl.load(v_tile + start64 * v_s, mask=inside, other=None if inside is None else 0.0)
        words = words_ptr
        if PARTIAL:
            tile = tl.load(tile_ptr + i // SPLIT).to(tl.int64)
            words = words_ptr + tile * TILE_WORDS + i % SPLIT * (TK // 32)
        start, stop = hidden_start - start, hidden_stop - start
        dq = through_keys(dq, q, dout, top, delta, k, v, words, scale, start, stop, TK, PARTIAL)
    return dq


@triton.jit(
    do_not_specialize=["seq_len", "kv_len", "num_rows", "heads", "groups_b", "text_start", "text_stop"]
)
def _queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, top_ptr, delta_ptr, launch_ptr, groups_ptr,
    full_start_ptr, full_count_ptr, full_idx_ptr,
    part_start_ptr, part_count_ptr, part_idx_ptr, part_tile_ptr, words_ptr, text_valid_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, dout_b, dout_h, dout_s, dq_b, dq_h, dq_s,
    scale, seq_len, kv_len, num_rows, heads, groups_b, text_start, text_stop,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """dQ. Grid and arguments as of `triton_forward._forward`."""
    b = tl.program_id(1).to(tl.int64)
    item = tl.load(launch_ptr + b * groups_b * num_rows + tl.program_id(0) // (BQ // TQ))
    h = (item // num_rows).to(tl.int64)
    block = item % num_rows
    in_block = tl.program_id(0) % (BQ // TQ) * TQ + tl.arange(0, TQ)
    rows = block * BQ + in_block
    rows64 = rows.to(tl.int64)
    d = tl.arange(0, DP)
    exists = rows < seq_len
    inside = exists[:, None] & (d < D)[None, :]

    q_tile = q_ptr + (b * q_b + h * q_h) * ALIGN + (rows64[:, None] * (q_s * ALIGN) + d[None, :])
    q = tl.load(q_tile, mask=inside, other=0.0)  # [TQ, DP]
    dout_tile = dout_ptr + (b * dout_b + h * dout_h) * ALIGN
    dout = tl.load(dout_tile + (rows64[:, None] * (dout_s * ALIGN) + d[None, :]), mask=inside, other=0.0)
    place = (b * heads + h) * seq_len + rows
    top = tl.load(top_ptr + place, mask=exists, other=float("inf"))
    delta = tl.load(delta_ptr + place, mask=exists, other=0.0)
    k_ptr += (b * k_b + h * k_h) * ALIGN
    v_ptr += (b * v_b + h * v_h) * ALIGN
    k_s *= ALIGN
    v_s *= ALIGN
    words_ptr += in_block * (BK // 32)
    hidden_start = text_stop
    if text_valid_ptr is not None:
        hidden_start = text_start + tl.load(text_valid_ptr + b).to(tl.int32)
    block += tl.load(groups_ptr + b * groups_b + h) * num_rows
    first_full, first_part = tl.load(full_start_ptr + block), tl.load(part_start_ptr + block)
    last_full = first_full + tl.load(full_count_ptr + block)
    last_part = first_part + tl.load(part_count_ptr + block)

    dq = tl.zeros([TQ, DP], tl.float32)
    dq = _over_keys(
        dq, q, dout, top, delta, k_ptr, v_ptr, k_s, v_s, first_full, last_full, full_idx_ptr, part_tile_ptr,
        words_ptr, scale * LOG2_E, kv_len, hidden_start, text_stop,
        D, DP, TK, BK // TK, BQ * (BK // 32), False,
    )  # fmt: skip
    dq = _over_keys(
        dq, q, dout, top, delta, k_ptr, v_ptr, k_s, v_s, first_part, last_part, part_idx_ptr, part_tile_ptr,
        words_ptr, scale * LOG2_E, kv_len, hidden_start, text_stop,
        D, DP, TK, BK // TK, BQ * (BK // 32), True,
    )  # fmt: skip
    dq_tile = dq_ptr + (b * dq_b + h * dq_h) * ALIGN + (rows64[:, None] * (dq_s * ALIGN) + d[None, :])
    tl.store(dq_tile, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _over_queries(
    dk, dv, k, v, q_ptr, dout_ptr, q_s, dout_s, top_ptr, delta_ptr, first, last, idx_ptr, tile_ptr, words_ptr,
    visible, scale, seq_len,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """dK and dV through the query blocks `idx_ptr[first:last]`, each in BQ / TQ steps of `TQ` queries."""
    cols = tl.arange(0, TQ)
    d = tl.arange(0, DP)
    for i in range(first * (BQ // TQ), last * (BQ // TQ)):
        in_block = i % (BQ // TQ) * TQ
        start = tl.load(idx_ptr + i // (BQ // TQ)) * BQ + in_block
        row = tl.minimum(start + cols, seq_len - 1)  # what is past the end weighs nothing
        row64 = row.to(tl.int64)
        inside = None
        if D < DP:
            inside = d[None, :] < D
        other = None if inside is None else 0.0
        q = tl.load(q_ptr + (row64[:, None] * q_s + d[None, :]), mask=inside, other=other)  # [TQ, DP]
        dout = tl.load(dout_ptr + (row64[:, None] * dout_s + d[None, :]), mask=inside, other=other)
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
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, top_ptr, delta_ptr, launch_ptr, groups_ptr,
    full_start_ptr, full_count_ptr, full_idx_ptr,
    part_start_ptr, part_count_ptr, part_idx_ptr, part_tile_ptr, words_ptr, text_valid_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, dout_b, dout_h, dout_s,
    dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    scale, seq_len, kv_len, num_cols, heads, groups_b, text_start, text_stop,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """dK and dV. Grid (heads * num_cols * BK / TK, batch); the lists are the transposed ones."""
    b = tl.program_id(1).to(tl.int64)
    item = tl.load(launch_ptr + b * groups_b * num_cols + tl.program_id(0) // (BK // TK))
    h = (item // num_cols).to(tl.int64)
    block = item % num_cols
    part = tl.program_id(0) % (BK // TK)
    keys = block * BK + part * TK + tl.arange(0, TK)
    keys64 = keys.to(tl.int64)
    d = tl.arange(0, DP)
    inside = (keys < kv_len)[:, None] & (d < D)[None, :]

    k_tile = k_ptr + (b * k_b + h * k_h) * ALIGN + (keys64[:, None] * (k_s * ALIGN) + d[None, :])
    v_tile = v_ptr + (b * v_b + h * v_h) * ALIGN + (keys64[:, None] * (v_s * ALIGN) + d[None, :])
    k = tl.load(k_tile, mask=inside, other=0.0)  # [TK, DP]
    v = tl.load(v_tile, mask=inside, other=0.0)
    q_ptr += (b * q_b + h * q_h) * ALIGN
    dout_ptr += (b * dout_b + h * dout_h) * ALIGN
    q_s *= ALIGN
    dout_s *= ALIGN
    top_ptr += (b * heads + h) * seq_len
    delta_ptr += (b * heads + h) * seq_len
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
        dk, dv, k, v, q_ptr, dout_ptr, q_s, dout_s, top_ptr, delta_ptr, first_full, last_full, full_idx_ptr,
        part_tile_ptr, words_ptr, visible, scale * LOG2_E, seq_len, D, DP, BQ, BK, TQ, TK, False,
    )  # fmt: skip
    dk, dv = _over_queries(
        dk, dv, k, v, q_ptr, dout_ptr, q_s, dout_s, top_ptr, delta_ptr, first_part, last_part, part_idx_ptr,
        part_tile_ptr, words_ptr, visible, scale * LOG2_E, seq_len, D, DP, BQ, BK, TQ, TK, True,
    )  # fmt: skip
    dk_tile = dk_ptr + (b * dk_b + h * dk_h) * ALIGN + (keys64[:, None] * (dk_s * ALIGN) + d[None, :])
    dv_tile = dv_ptr + (b * dv_b + h * dv_h) * ALIGN + (keys64[:, None] * (dv_s * ALIGN) + d[None, :])
    tl.store(dk_tile, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_tile, dv.to(dv_ptr.dtype.element_ty), mask=inside)


# -- launch --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Given:
    """What the kernels of dQ and of dK and dV read: inputs, and what `_prepare` left in `top` and `delta`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    top: torch.Tensor
    delta: torch.Tensor
    mask: BlockMask
    scale: float
    text_valid: Lengths

    @property
    def sizes(self) -> dict[str, int]:
        """Of heads and blocks, as the kernels know them."""
        head_dim, (bq, bk) = self.q.shape[3], self.mask.block_size
        return {"D": head_dim, "DP": padded_head_dim(head_dim), "BQ": bq, "BK": bk}

    def lists(
        self, arguments: Callable[..., tuple[torch.Tensor, ...]]
    ) -> tuple[tuple[torch.Tensor, ...], tuple]:
        """The mask's lists, by query blocks or by key blocks, and the numbers at the end of the arguments."""
        batch, heads = self.q.shape[:2]
        lists = arguments(self.mask, batch, heads)
        return lists, (heads, heads if len(lists[1]) > 1 else 0, *self.mask.text)


def dq_launch(given: Given, dq: torch.Tensor, options: dict[str, int]) -> tuple:
    """The kernel of dQ with its grid, positional and keyword arguments."""
    q, k, v, dout, mask = given.q, given.k, given.v, given.dout, given.mask
    lists, numbers = given.lists(mask_arguments)
    strides, align = strides_of(q, k, v, dout, dq)
    grid = (lists[0].shape[1] * (mask.block_size[0] // options["TQ"]), q.shape[0])
    args = (
        q, k, v, dout, dq, given.top, given.delta, *lists, given.text_valid, *strides, given.scale,
        q.shape[2], mask.kv_len, mask.num_rows, *numbers,
    )  # fmt: skip
    return _queries, grid, args, options | given.sizes | {"ALIGN": align}


def dkv_launch(given: Given, dk: torch.Tensor, dv: torch.Tensor, options: dict[str, int]) -> tuple:
    """The same of the kernel of dK and dV."""
    q, k, v, dout, mask = given.q, given.k, given.v, given.dout, given.mask
    lists, numbers = given.lists(transposed_arguments)
    strides, align = strides_of(q, k, v, dout, dk, dv)
    grid = (lists[0].shape[1] * (mask.block_size[1] // options["TK"]), q.shape[0])
    args = (
        q, k, v, dout, dk, dv, given.top, given.delta, *lists, given.text_valid, *strides, given.scale,
        q.shape[2], mask.kv_len, mask.num_cols, *numbers,
    )  # fmt: skip
    return _keys, grid, args, options | given.sizes | {"ALIGN": align}


def preparing(out, dout, lse, dlse, top, delta) -> tuple:
    """The launch of the first kernel, which both others need."""
    (batch, heads, seq_len, head_dim), (strides, align) = out.shape, strides_of(out, dout)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    sizes = {"D": head_dim, "DP": padded_head_dim(head_dim), "ALIGN": align, "ROWS": PREPARED_ROWS}
    grid = (heads * -(-seq_len // PREPARED_ROWS), batch)
    return (
        _prepare,
        grid,
        (out, dout, lse, dlse, top, delta, *strides, seq_len, heads),
        sizes | {"num_warps": 4},
    )


def strides_of(*tensors: torch.Tensor) -> tuple[list[int], int]:
    """Strides but the last of each, and how many elements they count."""
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    align = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return [stride // align for stride in strides], align
