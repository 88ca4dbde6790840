"""Block-sparse attention, forward, in Gluon for Hopper: one warp copies, two groups of four multiply.

As `triton_tma`, with the work shared out among warps as in FlashAttention-3 (Shah et al., 2024,
arXiv:2407.08608). A producer warp has the copy engine fetch the listed key blocks into a ring of buffers; two
groups of consumer warps have 64 query rows each. A group issues Q K^T of a block, then P V of the block
before, and computes the softmax while tensor cores are at work: its own, and the other group's.

Partial blocks come first, then full ones, so that one block, the first of either, goes ahead of both loops.
Gluon cannot be interpreted: without a GPU this is compiled, never run. It is looked at by `gpu_bench` before
it is timed, and taken by its name, or where a table of measurements names it.
"""

# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# (Gluon's annotations are those of Python's own objects)

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.errors import UnavailableError
from dit_accel.masks.block_mask import BlockMask

from .triton_configs import gluon_config, gpu, padded_head_dim
from .triton_forward import LAUNCH_OPTIONS, mask_arguments, outputs, with_positive_scale
from .triton_tma import copied, describable, described, launched

# Triton renamed it after 3.6
fetch = gl.constexpr(getattr(tma, "async_load", None) or tma.async_copy_global_to_shared)
LOWEST = gl.constexpr(torch.finfo(torch.float32).min)
LN_2 = gl.constexpr(math.log(2))
GROUP_ROWS = gl.constexpr(64)  # query rows of a group of four warps, as one multiplication takes them
GROUPS = gl.constexpr(2)
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


# -- kernel --------------------------------------------------------------------------------------------------


@gluon.jit
def _below(position):
    """32-bit word with the bits of positions before one set."""
    return gl.where(position >= 32, -1, (1 << gl.minimum(gl.maximum(position, 0), 31)) - 1)


@gluon.jit
def _hide(s, words, hidden_start, hidden_stop, whole, TK: gl.constexpr, SCORES: gl.constexpr):
    """Scores, -inf where the bits from `words` [rows] on do not show a key, but not in a `whole` block."""
    cols = gl.arange(0, TK, layout=gl.SliceLayout(0, SCORES))
    word = gl.load(words) & ~(_below(hidden_stop) & ~_below(hidden_start))
    word = word.expand_dims(1)
    for j in gl.static_range(32, TK, 32):
        right = gl.load(words + j // 32) & ~(_below(hidden_stop - j) & ~_below(hidden_start - j))
        word = gl.where(cols.expand_dims(0) < j, word, right.expand_dims(1))
    return gl.where(((word & (1 << (cols % 32)).expand_dims(0)) != 0) | whole, s, float("-inf"))


@gluon.jit
def _softmax(s, m, total, scale):
    """Weights of scores, what earlier sums are to be multiplied by, the new maximum and sum of each row."""
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - m_new.expand_dims(1))
    alpha = gl.exp2(m - m_new)
    return p, alpha, m_new, total * alpha + gl.sum(p, 1)


@gluon.jit
def _put(desc, ring, bars, place, turn, b, h, row, BUFFERS: gl.constexpr, BYTES: gl.constexpr):
    """Fetch a box into a place of the ring, once both groups have done with what was there."""
    mbarrier.wait(bars.index(2 * BUFFERS + place), (turn & 1) ^ 1)
    mbarrier.expect(bars.index(place), BYTES)
    fetch(desc, [b, h, row, 0], bars.index(place), ring.index(place))


@gluon.jit
def _produce(
    k_desc, v_desc, ring, bars, part_idx_ptr, first_part, last_part,
    full_idx_ptr, first_full, last_full, b, h,
    TK: gl.constexpr, DP: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """The producer warp: keys, then values of every listed block, partial ones first."""
    BYTES: gl.constexpr = TK * DP * 2
    partial = last_part - first_part
    for n in range(0, partial + last_full - first_full):
        at = gl.where(n < partial, first_part + n, first_full + n - partial)
        listed = gl.load(part_idx_ptr + at, mask=n < partial, other=0)
        row = (listed + gl.load(full_idx_ptr + at, mask=n >= partial, other=0)) * TK
        place = 2 * (n % BUFFERS)
        _put(k_desc, ring, bars, place, n // BUFFERS, b, h, row, BUFFERS, BYTES)
        _put(v_desc, ring, bars, place + 1, n // BUFFERS, b, h, row, BUFFERS, BYTES)


@gluon.jit
def _next(
    acc, m, total, weights, q, ring, bars, n, words, hidden_start, hidden_stop, scale,
    TK: gl.constexpr, DP: gl.constexpr, BUFFERS: gl.constexpr, PARTIAL: gl.constexpr,
    SCORES: gl.constexpr, SUMS: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Block n: its scores, while the values of block n - 1 are added with the weights that it left."""
    place, before = 2 * (n % BUFFERS), 2 * ((n - 1) % BUFFERS) + 1
    nothing = gl.zeros([GROUP_ROWS, TK], gl.float32, layout=SCORES)
    mbarrier.wait(bars.index(place), (n // BUFFERS) & 1)
    keys = ring.index(place).reshape([TK, DP]).permute((1, 0))
    scores = warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)
    mbarrier.wait(bars.index(before), ((n - 1) // BUFFERS) & 1)
    sums = warpgroup_mma(weights, ring.index(before).reshape([TK, DP]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(bars.index(2 * BUFFERS + place))
    if PARTIAL:
        s = _hide(s, words, hidden_start, hidden_stop, False, TK, SCORES)
    p, alpha, m, total = _softmax(s, m, total, scale)
    following = gl.convert_layout(p.to(ring.dtype), WEIGHTS)
    acc, following = warpgroup_mma_wait(0, deps=(sums, following))
    mbarrier.arrive(bars.index(2 * BUFFERS + before))
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS)).expand_dims(1)
    return acc, m, total, following


@gluon.jit
def _consume(
    group: gl.constexpr, q_buf, ring, bars, part_idx_ptr, part_tile_ptr, first_part, last_part,
    first_full, last_full, words_ptr, scale, hidden_start, text_stop,
    out_ptr, out_base, out_s, lse_ptr, lse_base, start, in_block, seq_len,
    BQ: gl.constexpr, TK: gl.constexpr, D: gl.constexpr, DP: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """A group of four warps: all listed blocks for its 64 query rows."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TK, 16]
    )
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DP, 16]
    )
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    TILE_WORDS: gl.constexpr = BQ * (TK // 32)
    rows = group * GROUP_ROWS + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SCORES))
    words_ptr += (in_block + rows) * (TK // 32)
    m = gl.full([GROUP_ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.zeros([GROUP_ROWS], gl.float32, layout=gl.SliceLayout(1, SCORES))
    acc = gl.zeros([GROUP_ROWS, DP], gl.float32, layout=SUMS)
    q = q_buf.index(group).reshape([GROUP_ROWS, DP])
    mbarrier.wait(bars.index(4 * BUFFERS + group), 0)
    partial = last_part - first_part
    blocks = partial + last_full - first_full
    if blocks > 0:
        tile = gl.load(part_tile_ptr + first_part, mask=partial > 0, other=0).to(gl.int64)
        row = gl.load(part_idx_ptr + first_part, mask=partial > 0, other=0) * TK
        mbarrier.wait(bars.index(0), 0)
        keys = ring.index(0).reshape([TK, DP]).permute((1, 0))
        nothing = gl.zeros([GROUP_ROWS, TK], gl.float32, layout=SCORES)
        s = warpgroup_mma(q, keys, nothing, use_acc=False)
        mbarrier.arrive(bars.index(2 * BUFFERS))
        words = words_ptr + tile * TILE_WORDS
        s = _hide(s, words, hidden_start - row, text_stop - row, partial == 0, TK, SCORES)
        p, _alpha, m, total = _softmax(s, m, total, scale)
        weights = gl.convert_layout(p.to(ring.dtype), WEIGHTS)
        for n in range(1, partial):
            tile = gl.load(part_tile_ptr + first_part + n).to(gl.int64)
            row = gl.load(part_idx_ptr + first_part + n) * TK
            acc, m, total, weights = _next(
                acc, m, total, weights, q, ring, bars, n,
                words_ptr + tile * TILE_WORDS, hidden_start - row, text_stop - row, scale,
                TK, DP, BUFFERS, True, SCORES, SUMS, WEIGHTS,
            )  # fmt: skip
        for n in range(gl.maximum(partial, 1), blocks):
            acc, m, total, weights = _next(
                acc, m, total, weights, q, ring, bars, n, words_ptr, 0, 0, scale,
                TK, DP, BUFFERS, False, SCORES, SUMS, WEIGHTS,
            )  # fmt: skip
        last = 2 * ((blocks - 1) % BUFFERS) + 1
        mbarrier.wait(bars.index(last), ((blocks - 1) // BUFFERS) & 1)
        acc = warpgroup_mma(weights, ring.index(last).reshape([TK, DP]), acc)
        mbarrier.arrive(bars.index(2 * BUFFERS + last))

    sums = gl.convert_layout(total, gl.SliceLayout(1, SUMS))
    none = sums == 0.0  # attended, and acc may be 0 * NaN
    out = acc / gl.where(none, 1.0, sums).expand_dims(1)
    out = gl.where(none.expand_dims(1), 0.0, out)
    out_rows = start + group * GROUP_ROWS + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SUMS))
    d = gl.arange(0, DP, layout=gl.SliceLayout(0, SUMS))
    out_tile = out_ptr + out_base + (out_rows.to(gl.int64) * out_s).expand_dims(1) + d.expand_dims(0)
    inside = (out_rows < seq_len).expand_dims(1) & (d < D).expand_dims(0)
    gl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=inside)
    lse = gl.where(total == 0.0, float("-inf"), (m + gl.log2(total)) * LN_2)
    gl.store(lse_ptr + lse_base + start + rows, lse, mask=start + rows < seq_len)


@gluon.jit(do_not_specialize=["seq_len", "num_rows", "heads", "groups_b", "text_start", "text_stop"])
def _forward(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, launch_ptr, groups_ptr,
    full_start_ptr, full_count_ptr, full_idx_ptr,
    part_start_ptr, part_count_ptr, part_idx_ptr, part_tile_ptr, words_ptr, text_valid_ptr,
    out_b, out_h, out_s, scale, seq_len, num_rows, heads, groups_b, text_start, text_stop,
    D: gl.constexpr, DP: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr, TQ: gl.constexpr, TK: gl.constexpr,
    ALIGN: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """Grid and arguments as in `triton_tma`; `BUFFERS` blocks are held, each of `TK` keys."""
    gl.static_assert(TQ == GROUPS * GROUP_ROWS)
    gl.static_assert(TK == BK)
    b = gl.program_id(1)
    item = gl.load(launch_ptr + b.to(gl.int64) * groups_b * num_rows + gl.program_id(0) // (BQ // TQ))
    h = item // num_rows
    block = item % num_rows
    in_block = gl.program_id(0) % (BQ // TQ) * TQ
    start = block * BQ + in_block
    hidden_start = text_stop
    if text_valid_ptr is not None:
        hidden_start = text_start + gl.load(text_valid_ptr + b).to(gl.int32)
    block += gl.load(groups_ptr + b * groups_b + h) * num_rows
    first_full, first_part = gl.load(full_start_ptr + block), gl.load(part_start_ptr + block)
    last_full = first_full + gl.load(full_count_ptr + block)
    last_part = first_part + gl.load(part_count_ptr + block)
    out_base = (b.to(gl.int64) * out_b + h.to(gl.int64) * out_h) * ALIGN
    lse_base = (b.to(gl.int64) * heads + h) * seq_len

    q_buf = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, GROUP_ROWS, DP], q_desc.layout)
    ring = gl.allocate_shared_memory(k_desc.dtype, [2 * BUFFERS, 1, 1, BK, DP], k_desc.layout)
    # of the ring's places: filled, then emptied; and of the query rows of each group
    bars = gl.allocate_shared_memory(gl.int64, [4 * BUFFERS + GROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * BUFFERS):
        mbarrier.init(bars.index(i), count=1)
        mbarrier.init(bars.index(2 * BUFFERS + i), count=GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(bars.index(4 * BUFFERS + i), count=1)
        mbarrier.expect(bars.index(4 * BUFFERS + i), GROUP_ROWS * DP * 2)
        fetch(q_desc, [b, h, start + i * GROUP_ROWS, 0], bars.index(4 * BUFFERS + i), q_buf.index(i))
    gl.warp_specialize(
        [
            (_consume, (
                0, q_buf, ring, bars, part_idx_ptr, part_tile_ptr, first_part, last_part,
                first_full, last_full, words_ptr, scale, hidden_start, text_stop,
                out_ptr, out_base, out_s * ALIGN, lse_ptr, lse_base, start, in_block, seq_len,
                BQ, BK, D, DP, BUFFERS,
            )),
            (_consume, (
                1, q_buf, ring, bars, part_idx_ptr, part_tile_ptr, first_part, last_part,
                first_full, last_full, words_ptr, scale, hidden_start, text_stop,
                out_ptr, out_base, out_s * ALIGN, lse_ptr, lse_base, start, in_block, seq_len,
                BQ, BK, D, DP, BUFFERS,
            )),
            (_produce, (
                k_desc, v_desc, ring, bars, part_idx_ptr, first_part, last_part,
                full_idx_ptr, first_full, last_full, b, h, BK, DP, BUFFERS,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


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
    """As `triton_tma.attention`; of the options `num_stages` counts, as the blocks that are held.

    Raises:
        UnavailableError: the kernel does not compile with this Triton; the message says why.
    """
    if (reason := failure(q.shape[3], q.dtype, q.device)) is not None:
        raise UnavailableError(f"the Gluon kernel does not compile here: {reason}; use backend='triton-tma'")
    if q.numel() == 0:
        return outputs(q)
    q, scale = with_positive_scale(q, scale)
    if options is None:
        options = gluon_config(q.shape[3], mask.block_size, gpu(q.device))
    return launched(_forward, launch_arguments, q, k, v, mask, scale, text_valid, options)


@cache
def failure(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel does not compile for a device, or None; it is compiled once to know."""
    q = torch.empty(1, 1, 128, head_dim, dtype=dtype, device=device)
    q = q if describable(q) else copied(q)
    mask = BlockMask.from_token_mask(torch.ones(128, 128, dtype=torch.bool, device=device))
    try:
        grid, args, options = launch_arguments(
            q, q, q, q, q.new_empty(1, 1, 128, dtype=torch.float32), mask_arguments(mask, 1, 1), None, 1.0,
            mask.block_size, mask.text, gluon_config(head_dim, mask.block_size, gpu(device)),
        )  # fmt: skip
        with torch.cuda.device_of(q):
            _forward.warmup(*args, grid=grid, **options, **LAUNCH_OPTIONS)
    except Exception as error:  # of an experimental compiler, whose versions differ in what they raise
        return f"{type(error).__name__}: {error}".strip()[:300]
    return None


def descriptor(x: torch.Tensor, rows: int, dim: int) -> Any:
    """As `triton_tma.descriptor`, with the layout in which shared memory holds a box."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(*described(x, rows, dim), layout)


def launch_arguments(q, k, v, out, lse, mask, text_valid, scale, block_size, text, options):
    """Grid, positional and keyword arguments of `_forward`, as in `triton_tma`."""
    order, groups, *_, words = mask
    (batch, heads, seq_len, head_dim), (bq, bk) = q.shape, block_size
    if not words.numel():  # the first block's bits are looked at, and if it is a full one passed over
        words = words.new_zeros(1, bq, bk // 32)
    dim, rows = max(64, padded_head_dim(head_dim)), GROUPS.value * GROUP_ROWS.value
    align = 8 if all(stride % 8 == 0 for stride in out.stride()[:3]) else 1
    args = (
        descriptor(q, GROUP_ROWS.value, dim), descriptor(k, bk, dim), descriptor(v, bk, dim), out, lse,
        *mask[:-1], words, text_valid, *(stride // align for stride in out.stride()[:3]),
        scale * math.log2(math.e), seq_len, -(-seq_len // bq), heads, heads if len(groups) > 1 else 0, *text,
    )  # fmt: skip
    sizes = {"D": head_dim, "DP": dim, "BQ": bq, "BK": bk, "ALIGN": align, "BUFFERS": options["num_stages"]}
    return (order.shape[1] * (bq // rows), batch), args, options | sizes | {"num_warps": 4}  # of a group
