"""Block-sparse attention, forward, in Triton.

For query row i whose keys J(i) a `BlockMask` names:

    out_i = sum_{j in J(i)} exp(scale q_i.k_j - lse_i) v_j
    lse_i = log sum_{j in J(i)} exp(scale q_i.k_j)

One program holds a tile of queries and streams the listed key blocks past it with the online softmax of
FlashAttention-2 (Dao, 2023, arXiv:2307.08691); absent blocks are skipped, as in block-sparse FlashAttention
(Dao et al., 2022, arXiv:2205.14135). Full blocks come first, without any mask arithmetic, then partial ones
under their bit tiles, the end of the sequence and the sample's text length. Scores live in base 2 (log2(e)
folded into the scale); all sums are fp32. fp32 inputs are multiplied in IEEE fp32: three TF32 passes would
use tensor cores, but when their split truncates, the error is twice that of plain fp32: the whole tolerance.

Quantized (`quantized.py`), scores are sums of int8 products times the scale of their query and that of their
group of keys. Where P and V have few bits as well, the products of one group, in int32 or in the tensor
cores' own fp32 of some 22 bits, are added to fp32 sums once they are complete: two levels, as in
SageAttention2 (arXiv 2411.10958).
"""

# pyright: reportOperatorIssue=false
# (Triton's annotations leave out the remainder of an int by a `constexpr`)

import math

import torch
import triton
import triton.language as tl
from torch.library import custom_op, triton_op, wrap_triton

from dit_accel.masks.block_mask import BlockMask

from .launch_order import mask_arguments
from .triton_configs import config, gpu
from .triton_configs import padded_head_dim as held_head_dim

# -- kernel --------------------------------------------------------------------------------------------------

LOWEST = tl.constexpr(
    torch.finfo(torch.float32).min
)  # finite, so that the running maximum of a row without keys makes no NaN
LN_2 = tl.constexpr(math.log(2))
ROUNDED = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away, it leaves a whole number


@triton.jit
def _bits(first, stop):
    """32-bit word with the bits of positions first <= j < stop set."""
    one = tl.full([], 1, tl.int64)
    below_first = (one << tl.minimum(tl.maximum(first, 0), 32)) - 1
    below_stop = (one << tl.minimum(tl.maximum(stop, 0), 32)) - 1
    return (below_stop & ~below_first).to(tl.int32)


@triton.jit
def shown(words, hidden_start, hidden_stop, TK: tl.constexpr):
    """Bits of some queries, from `words` [TQ] on, on `TK` keys of which a range is hidden: [TQ, TK]."""
    tl.static_assert(TK % 32 == 0, "a word has the bits of 32 keys")
    cols = tl.arange(0, TK)
    word = (tl.load(words) & ~_bits(hidden_start, hidden_stop))[:, None]  # [TQ, 1]
    for j in tl.static_range(32, TK, 32):  # pyright: ignore[reportGeneralTypeIssues]
        right = tl.load(words + j // 32) & ~_bits(hidden_start - j, hidden_stop - j)
        word = tl.where(cols[None, :] < j, word, right[:, None])  # [TQ, TK]
    return (word & (1 << (cols % 32))[None, :]) != 0


@triton.jit
def powers(s, factor, top, SCALED: tl.constexpr):
    """2^(s * factor - top), with a top of each row, and a factor too unless it is one number for all."""
    if SCALED:  # it is in s already
        return tl.exp2(s - top[:, None])
    if factor.type.is_block():
        factor = factor[:, None]
    return tl.exp2(tl.fma(s, factor, -top[:, None]))


@triton.jit
def rounded(s, factor, top, m, WEIGHTS: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr):
    """Weights of a group of keys as codes, of which `WEIGHTS` is the largest.

    `top` is the largest score of each row in the group, `m` so far. Returns codes of `DTYPE`, the same as
    fp32, and the share that a code of 1 has.
    """
    top = tl.maximum(top, LOWEST)
    p = powers(s, factor, top, SCALED) * WEIGHTS  # [TQ, TK]
    if tl.int8 == DTYPE:
        p = p + ROUNDED - ROUNDED
        codes = p.to(tl.int8)
    else:
        codes = p.to(DTYPE)
        p = codes.to(tl.float32)
    return codes, p, tl.exp2(top - m) / WEIGHTS


@triton.jit
def _stream(
    acc, m, total, q, k_ptr, v_ptr, k_s, v_s, first, last, idx_ptr, tile_ptr, words_ptr,
    scale, pv_threshold, k_scale_ptr, kv_len, hidden_start, hidden_stop,
    D: tl.constexpr, DP: tl.constexpr, TK: tl.constexpr, SPLIT: tl.constexpr, TILE_WORDS: tl.constexpr,
    GROUP: tl.constexpr, WEIGHTS: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Attend the key blocks `idx_ptr[first:last]`, each in `SPLIT` steps of `TK` keys.

    `scale` is one number; with a `GROUP` of keys that share one of `k_scale_ptr`, one of each query. With
    `WEIGHTS`, the largest of a group's, V is transposed. What is quantized is padded and needs no bounds.
    `pv_threshold` is one of each query, -inf past the last, or None: `reference.skipped`.
    """
    cols = tl.arange(0, TK)
    d = tl.arange(0, DP)
    k_tile = k_ptr + (cols[:, None] * k_s + d[None, :])
    if WEIGHTS:
        v_tile = v_ptr + (d[:, None] * v_s + cols[None, :])
    else:
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

        if GROUP:
            k = tl.load(k_tile + start64 * k_s)  # [TK, DP]
            factor = scale * tl.load(k_scale_ptr + start // GROUP)  # [TQ]
            s = tl.dot(q, tl.trans(k)).to(tl.float32)  # [TQ, TK]
            if PARTIAL:  # a scale that is not a number must not reach what is hidden
                s *= factor[:, None]
                factor = 1.0
        else:
            k = tl.load(k_tile + start64 * k_s, mask=inside, other=None if inside is None else 0.0)
            factor = scale
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if PARTIAL:
            tile = tl.load(tile_ptr + i // SPLIT).to(tl.int64)
            words = words_ptr + tile * TILE_WORDS + i % SPLIT * (TK // 32)
            s = tl.where(shown(words, hidden_start - start, hidden_stop - start, TK), s, float("-inf"))

        top = tl.max(s, 1) * factor  # [TQ]
        m_new = tl.maximum(m, top)
        alpha = tl.exp2(m - m_new)
        if pv_threshold is not None:
            counts = tl.max(top - m_new + pv_threshold, 0) > 0
        if WEIGHTS:
            codes, p, share = rounded(s, factor, top, m_new, WEIGHTS, v_ptr.dtype.element_ty, PARTIAL)
            total = total * alpha + tl.sum(p, 1) * share
            acc = acc * alpha[:, None]
            if pv_threshold is None:
                v = tl.load(v_tile + start64)  # [DP, TK]
                acc += tl.dot(codes, tl.trans(v)).to(tl.float32) * share[:, None]  # [TQ, DP]
            elif counts:
                v = tl.load(v_tile + start64)
                acc += tl.dot(codes, tl.trans(v)).to(tl.float32) * share[:, None]
        else:
            p = powers(s, factor, m_new, GROUP and PARTIAL)
            total = total * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None]
            if pv_threshold is None:
                v = tl.load(
                    v_tile + start64 * v_s, mask=inside, other=None if inside is None else 0.0
                )  # [TK, DP]
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
            elif counts:
                v = tl.load(v_tile + start64 * v_s, mask=inside, other=None if inside is None else 0.0)
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m = m_new
    return acc, m, total


@triton.jit(
    do_not_specialize=["seq_len", "kv_len", "num_rows", "heads", "groups_b", "text_start", "text_stop"]
)
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, launch_ptr, groups_ptr,
    full_start_ptr, full_count_ptr, full_idx_ptr,
    part_start_ptr, part_count_ptr, part_idx_ptr, part_tile_ptr, words_ptr, text_valid_ptr,
    q_scale_ptr, k_scale_ptr, v_scale_ptr, v_mean_ptr, shift_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, out_b, out_h, out_s,
    scale, pv_threshold, seq_len, kv_len, num_rows, heads, groups_b, text_start, text_stop,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    ALIGN: tl.constexpr, GROUP: tl.constexpr, WEIGHTS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (heads * num_rows * BQ / TQ, batch): each program computes `TQ` query rows of one head.

    Strides count `ALIGN` elements: Triton looks for arguments divisible by 16, vector loads need 8 elements.
    `groups_b` is the stride of samples in the groups of heads, 0 where all share theirs. What only quantized
    inputs have is contiguous; `QUERIES` and `KEYS` are the lengths that their codes are padded to.
    """
    b = tl.program_id(1).to(tl.int64)
    item = tl.load(launch_ptr + b * groups_b * num_rows + tl.program_id(0) // (BQ // TQ))
    h = (item // num_rows).to(tl.int64)
    block = item % num_rows
    in_block = tl.program_id(0) % (BQ // TQ) * TQ + tl.arange(0, TQ)
    rows = block * BQ + in_block
    rows64 = rows.to(tl.int64)
    d = tl.arange(0, DP)
    inside = (rows < seq_len)[:, None] & (d < D)[None, :]

    q_tile = q_ptr + (b * q_b + h * q_h) * ALIGN + (rows64[:, None] * (q_s * ALIGN) + d[None, :])
    if GROUP:
        q = tl.load(q_tile)  # [TQ, DP], int8
        scale = tl.load(q_scale_ptr + (b * heads + h) * QUERIES + rows)  # [TQ]
        k_scale_ptr += (b * heads + h) * (KEYS // GROUP)
    else:
        q = tl.load(q_tile, mask=inside, other=0.0)
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

    if pv_threshold is not None:
        pv_threshold = tl.where(rows < seq_len, pv_threshold, float("-inf"))

    m = tl.full([TQ], LOWEST, tl.float32)
    total = tl.zeros([TQ], tl.float32)
    acc = tl.zeros([TQ, DP], tl.float32)
    acc, m, total = _stream(
        acc, m, total, q, k_ptr, v_ptr, k_s, v_s, first_full, last_full, full_idx_ptr, part_tile_ptr,
        words_ptr, scale, pv_threshold, k_scale_ptr, kv_len, hidden_start, text_stop,
        D, DP, TK, BK // TK, BQ * (BK // 32), GROUP, WEIGHTS, False,
    )  # fmt: skip
    acc, m, total = _stream(
        acc, m, total, q, k_ptr, v_ptr, k_s, v_s, first_part, last_part, part_idx_ptr, part_tile_ptr,
        words_ptr, scale, pv_threshold, k_scale_ptr, kv_len, hidden_start, text_stop,
        D, DP, TK, BK // TK, BQ * (BK // 32), GROUP, WEIGHTS, True,
    )  # fmt: skip

    nothing = total == 0.0  # attended, and acc may be 0 * NaN
    out = acc / tl.where(nothing, 1.0, total)[:, None]  # [TQ, DP]
    if WEIGHTS:
        channel = (b * heads + h) * DP + d
        out = out * tl.load(v_scale_ptr + channel)[None, :] + tl.load(v_mean_ptr + channel)[None, :]
    out = tl.where(nothing[:, None], 0.0, out)
    out_tile = out_ptr + (b * out_b + h * out_h) * ALIGN + (rows64[:, None] * (out_s * ALIGN) + d[None, :])
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=inside)
    lse = m + tl.log2(total)  # [TQ]
    if GROUP:
        lse += tl.load(shift_ptr + (b * heads + h) * seq_len + rows, mask=rows < seq_len, other=0.0)
    lse = tl.where(nothing, float("-inf"), lse * LN_2)
    tl.store(lse_ptr + (b * heads + h) * seq_len + rows, lse, mask=rows < seq_len)


# Triton reads TRITON_INTERPRET when `triton.jit` runs, so at import; setting it later changes nothing here.
INTERPRETED = not isinstance(_forward, triton.runtime.JITFunction)

LAUNCH_OPTIONS = {"enable_fp_fusion": True}  # no longer Triton's default from 3.10 on


# -- launch --------------------------------------------------------------------------------------------------


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    scale: float,
    text_valid: torch.Tensor | None,
    pv_threshold: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, like q, and the log-sum-exp of the scores (batch, heads, seq_len), fp32, natural log.

    Inputs are as in the public function, which has checked them.
    """
    q, scale = with_positive_scale(q, scale)
    if INTERPRETED and q.dtype == torch.bfloat16:  # Triton's interpreter would multiply the bit patterns
        options = {"scale": scale, "text_valid": text_valid, "pv_threshold": pv_threshold}
        out, lse = attention(q.float(), k.float(), v.float(), mask, **options)
        return out.to(q.dtype), lse
    return _block_sparse_attention(
        addressable(q), addressable(k), addressable(v), *mask_arguments(mask, *q.shape[:2]), text_valid,
        scale, pv_threshold, *mask.block_size, *mask.text,
    )  # fmt: skip


def with_positive_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """Queries and a scale above 0 of the same scores, as kernels take maxima before they scale."""
    return (q, scale) if scale > 0 else (q * (-1.0 if scale < 0 else 0.0), abs(scale) or 1.0)


def addressable(x: torch.Tensor) -> torch.Tensor:
    """x itself where the kernel can address it: last dimension contiguous, 32-bit offsets inside a block."""
    return x if x.stride(3) == 1 and x.stride(2) < 2**24 else x.contiguous()


def launch_arguments(
    q, k, v, out, lse, mask, text_valid, scale, block_size, text, options, quantized=None, weights=None,
    pv_threshold=None,
):  # fmt: skip
    """Grid, positional and keyword arguments of `_forward`; see `mask_arguments` and `config`.

    With the inputs `quantized`, q, k and v are those that they were made of; `weights` are the format's.
    """
    order, groups = mask[:2]
    (batch, heads, seq_len, head_dim), kv_len, bq = q.shape, k.shape[2], block_size[0]
    extra, sizes = [None] * 5, {"GROUP": None, "WEIGHTS": None, "QUERIES": None, "KEYS": None}
    if quantized is not None:
        q, k, v = quantized.q, quantized.k, quantized.v
        extra = [getattr(quantized, name) for name in ("q_scale", "k_scale", "v_scale", "v_mean", "shift")]
        sizes = {"GROUP": quantized.group, "WEIGHTS": weights, "QUERIES": q.shape[2], "KEYS": k.shape[2]}
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
    align = 8 if all(stride % 8 == 0 for stride in strides) else 1
    args = (
        q, k, v, out, lse, *mask, text_valid, *extra,
        *(stride // align for stride in strides),
        scale * math.log2(math.e), pv_threshold, seq_len, kv_len, -(-seq_len // bq), heads,
        heads if len(groups) > 1 else 0, *text,
    )  # fmt: skip
    sizes |= {"D": head_dim, "DP": held_head_dim(head_dim), "BQ": bq, "BK": block_size[1], "ALIGN": align}
    return (order.shape[1] * (bq // options["TQ"]), batch), args, options | sizes


def outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for an output and a log-sum-exp."""
    return empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def empty_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Room for a result of the shape of x, in its layout where the kernel can write it."""
    empty = torch.empty_like(x, dtype=dtype)
    if empty.stride(3) == 1:
        return empty
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    order: torch.Tensor,
    groups: torch.Tensor,
    full_start: torch.Tensor,
    full_count: torch.Tensor,
    full_index: torch.Tensor,
    part_start: torch.Tensor,
    part_count: torch.Tensor,
    part_index: torch.Tensor,
    part_tile: torch.Tensor,
    words: torch.Tensor,
    text_valid: torch.Tensor | None,
    scale: float,
    pv_threshold: float | None,
    block_q: int,
    block_k: int,
    text_start: int,
    text_stop: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = outputs(q)
    device = (8, 0) if INTERPRETED else gpu(q.device)
    options = config(q.shape[3], q.dtype, (block_q, block_k), device)
    mask = (
        order, groups, full_start, full_count, full_index,
        part_start, part_count, part_index, part_tile, words,
    )  # fmt: skip
    grid, args, options = launch_arguments(
        q, k, v, out, lse, mask, text_valid, scale, (block_q, block_k), (text_start, text_stop), options,
        pv_threshold=pv_threshold,
    )  # fmt: skip
    kernel = _forward if INTERPRETED else wrap_triton(_forward)
    if kernel is _forward:  # a launch; otherwise torch.compile records one, and knows fewer options
        with torch.cuda.device_of(q):
            kernel[grid](*args, **options, **LAUNCH_OPTIONS)
    else:
        kernel[grid](*args, **options)
    return out, lse


# torch.compile looks through a triton_op at its kernel; an interpreted kernel has to hide in an opaque op.
_block_sparse_attention = (custom_op if INTERPRETED else triton_op)(
    "dit_accel::block_sparse_attention", _block_sparse_attention, mutates_args=()
)


@_block_sparse_attention.register_fake
def _(q, *_args, **_kwargs):
    return outputs(q)
