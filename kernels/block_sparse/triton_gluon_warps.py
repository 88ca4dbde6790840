"""What the warps of the kernel in Gluon do (`triton_gluon`): one fetches, two groups of four multiply.

Each takes the program's tiles of query rows one after the other, and of each its key blocks, partial ones
first. Barriers in shared memory keep them together: places of the rings of keys and values are filled and
emptied in turn, and so are the query rows of each group. Blocks are counted over all tiles of a program, as
the turns of a place are.
"""

# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# (Gluon's annotations are those of Python's own objects)

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton renamed it after 3.6
fetch = gl.constexpr(getattr(tma, "async_load", None) or tma.async_copy_global_to_shared)
LOWEST = gl.constexpr(torch.finfo(torch.float32).min)
LN_2 = gl.constexpr(math.log(2))
GROUP_ROWS = gl.constexpr(64)  # query rows of a group of four warps, as one multiplication takes them
GROUPS = gl.constexpr(2)


# -- tiles and barriers --------------------------------------------------------------------------------------


@gluon.jit
def tile(t, lists, heads, num_rows, groups_b):
    """Sample, head and query block of tile t; its first partial and first full block, how many there are."""
    launch_ptr, groups_ptr, full_start_ptr, full_count_ptr, part_start_ptr, part_count_ptr = lists
    items = heads * num_rows
    b = t // items
    item = gl.load(launch_ptr + b.to(gl.int64) * groups_b * num_rows + t % items)
    h = item // num_rows
    row = item % num_rows
    block = row + gl.load(groups_ptr + b * groups_b + h) * num_rows
    first_part, first_full = gl.load(part_start_ptr + block), gl.load(full_start_ptr + block)
    partial = gl.load(part_count_ptr + block)
    return b, h, row, first_part, partial, first_full, partial + gl.load(full_count_ptr + block)


@gluon.jit
def filled(bars, place, BUFFERS: gl.constexpr):
    """The barrier of a place of the rings: 2 * (n % BUFFERS) of keys of block n, the next of its values."""
    return bars.index(place)


@gluon.jit
def emptied(bars, place, BUFFERS: gl.constexpr):
    """The barrier at which the groups say that they have read such a place."""
    return bars.index(2 * BUFFERS + place)


@gluon.jit
def queries_filled(bars, group, BUFFERS: gl.constexpr):
    """The barrier of the query rows of a group: they are there."""
    return bars.index(4 * BUFFERS + group)


@gluon.jit
def queries_emptied(bars, group, BUFFERS: gl.constexpr):
    """The barrier at which a group says that it needs its query rows no more."""
    return bars.index(4 * BUFFERS + GROUPS + group)


@gluon.jit
def turn_of(bars, group, BUFFERS: gl.constexpr):
    """The barrier of a group's turn: the other one has issued its multiplications."""
    return bars.index(4 * BUFFERS + 2 * GROUPS + group)


@gluon.jit
def make_barriers(BUFFERS: gl.constexpr):
    """All of them, with how many arrivals each waits for."""
    bars = gl.allocate_shared_memory(gl.int64, [4 * BUFFERS + 3 * GROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * BUFFERS):
        mbarrier.init(filled(bars, i, BUFFERS), count=1)
        mbarrier.init(emptied(bars, i, BUFFERS), count=GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(queries_filled(bars, i, BUFFERS), count=1)
        mbarrier.init(queries_emptied(bars, i, BUFFERS), count=1)
        mbarrier.init(turn_of(bars, i, BUFFERS), count=1)
    return bars


# -- producer ------------------------------------------------------------------------------------------------


@gluon.jit
def _put(desc, at, buffer, full, empty, turn, BYTES: gl.constexpr):
    """Fetch a box into a buffer, once those who read it have done with what was there."""
    mbarrier.wait(empty, (turn & 1) ^ 1)
    mbarrier.expect(full, BYTES)
    fetch(desc, at, full, buffer)


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, q_buf, k_ring, v_ring, bars, lists, part_idx_ptr, full_idx_ptr,
    tiles, heads, num_rows, groups_b,
    TK: gl.constexpr, DP: gl.constexpr, BUFFERS: gl.constexpr,
    Q_BYTES: gl.constexpr, K_BYTES: gl.constexpr, V_BYTES: gl.constexpr,
):  # fmt: skip
    """The producer warp: query rows, then keys and values of every listed block."""
    done = 0  # blocks of earlier tiles
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, h, block, first_part, partial, first_full, blocks = tile(t, lists, heads, num_rows, groups_b)
        for i in gl.static_range(GROUPS):
            at = [b, h, (block * GROUPS + i) * GROUP_ROWS, 0]
            full, empty = queries_filled(bars, i, BUFFERS), queries_emptied(bars, i, BUFFERS)
            _put(q_desc, at, q_buf.index(i), full, empty, t // gl.num_programs(0), Q_BYTES)
        for i in range(0, blocks):
            listed = gl.load(part_idx_ptr + first_part + i, mask=i < partial, other=0)
            row = (
                listed + gl.load(full_idx_ptr + (first_full + i - partial), mask=i >= partial, other=0)
            ) * TK
            n = done + i
            place = n % BUFFERS
            full, empty = filled(bars, 2 * place, BUFFERS), emptied(bars, 2 * place, BUFFERS)
            _put(k_desc, [b, h, row, 0], k_ring.index(place), full, empty, n // BUFFERS, K_BYTES)
            full, empty = filled(bars, 2 * place + 1, BUFFERS), emptied(bars, 2 * place + 1, BUFFERS)
            _put(v_desc, [b, h, row, 0], v_ring.index(place), full, empty, n // BUFFERS, V_BYTES)
        done += blocks


# -- consumers -----------------------------------------------------------------------------------------------


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
def _softmax(s, factor, m, total, SCALED: gl.constexpr):
    """Weights of scores, what earlier sums are to be multiplied by, the new maximum and sum of each row.

    `SCALED` scores have their factor, which is one of each row or one for all.
    """
    if SCALED:
        m_new = gl.maximum(m, gl.max(s, 1))
    else:
        m_new = gl.maximum(m, gl.max(s, 1) * factor)
        s = s * (factor.expand_dims(1) if factor.type.is_block() else factor)
    p = gl.exp2(s - m_new.expand_dims(1))
    alpha = gl.exp2(m - m_new)
    return p, alpha, m_new, total * alpha + gl.sum(p, 1)


@gluon.jit
def _my_turn(bars, n, group: gl.constexpr, BUFFERS: gl.constexpr):
    """Wait until the other group has issued its multiplications: group 1 block n's, group 0 those before."""
    mbarrier.wait(turn_of(bars, group, BUFFERS), (n & 1) ^ (1 - group))


@gluon.jit
def _keys(k_ring, place, TK: gl.constexpr, DP: gl.constexpr):
    return k_ring.index(place).reshape([TK, DP]).permute((1, 0))


@gluon.jit
def _scores(q, k_ring, place, TK: gl.constexpr, DP: gl.constexpr, SCORES: gl.constexpr):
    """Issue Q K^T of a block."""
    nothing = gl.zeros([GROUP_ROWS, TK], gl.int32 if q.dtype == gl.int8 else gl.float32, layout=SCORES)
    return warpgroup_mma(q, _keys(k_ring, place, TK, DP), nothing, use_acc=False, is_async=True)


@gluon.jit
def _weighed(acc, weights, v_ring, place, TK: gl.constexpr, DP: gl.constexpr):
    """Issue P V of a block, added to the sums."""
    return warpgroup_mma(weights, v_ring.index(place).reshape([TK, DP]), acc, is_async=True)


@gluon.jit
def _next(
    acc, m, total, weights, q, k_ring, v_ring, bars, n, words, hidden_start, hidden_stop, factor,
    group: gl.constexpr, TK: gl.constexpr, DP: gl.constexpr, BUFFERS: gl.constexpr,
    PARTIAL: gl.constexpr, PING_PONG: gl.constexpr,
    SCORES: gl.constexpr, SUMS: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Block n: its scores, while the values of block n - 1 are added with the weights that it left."""
    SCALED: gl.constexpr = PARTIAL and q.dtype == gl.int8
    place, before = n % BUFFERS, (n - 1) % BUFFERS
    mbarrier.wait(filled(bars, 2 * place, BUFFERS), (n // BUFFERS) & 1)
    if PING_PONG:
        _my_turn(bars, n, group, BUFFERS)
    scores = _scores(q, k_ring, place, TK, DP, SCORES)
    mbarrier.wait(filled(bars, 2 * before + 1, BUFFERS), ((n - 1) // BUFFERS) & 1)
    sums = _weighed(acc, weights, v_ring, before, TK, DP)
    if PING_PONG:
        mbarrier.arrive(turn_of(bars, 1 - group, BUFFERS))
    s = warpgroup_mma_wait(1, deps=(scores,)).to(gl.float32)
    mbarrier.arrive(emptied(bars, 2 * place, BUFFERS))
    if SCALED:  # before keys are hidden: a scale that is not a number must not reach them
        s = s * factor.expand_dims(1)
    if PARTIAL:
        s = _hide(s, words, hidden_start, hidden_stop, False, TK, SCORES)
    p, alpha, m, total = _softmax(s, factor, m, total, SCALED)
    following = gl.convert_layout(p.to(v_ring.dtype), WEIGHTS)
    acc, following = warpgroup_mma_wait(0, deps=(sums, following))
    mbarrier.arrive(emptied(bars, 2 * before + 1, BUFFERS))
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS)).expand_dims(1)
    return acc, m, total, following


@gluon.jit
def consume(
    group: gl.constexpr, q_buf, k_ring, v_ring, bars, lists,
    part_idx_ptr, part_tile_ptr, full_idx_ptr, words_ptr, text_valid_ptr,
    q_scale_ptr, k_scale_ptr, shift_ptr, out_ptr, lse_ptr,
    out_b, out_h, out_s, scale, tiles, seq_len, heads, num_rows, groups_b, text_start, text_stop,
    TK: gl.constexpr, D: gl.constexpr, DP: gl.constexpr, BUFFERS: gl.constexpr, PING_PONG: gl.constexpr,
    QUERIES: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """A group of four warps: all listed blocks for its 64 query rows of each tile."""
    CODES: gl.constexpr = q_buf.dtype == gl.int8
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TK, 32 if CODES else 16]
    )
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DP, 16]
    )
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    TILE_WORDS: gl.constexpr = GROUPS * GROUP_ROWS * (TK // 32)
    in_block = group * GROUP_ROWS + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SCORES))
    words_ptr += in_block * (TK // 32)
    d = gl.arange(0, DP, layout=gl.SliceLayout(0, SUMS))
    q = q_buf.index(group).reshape([GROUP_ROWS, DP])
    done = 0  # blocks of earlier tiles
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, h, block, first_part, partial, first_full, blocks = tile(t, lists, heads, num_rows, groups_b)
        head = b.to(gl.int64) * heads + h
        hidden_start = text_stop
        if text_valid_ptr is not None:
            hidden_start = text_start + gl.load(text_valid_ptr + b).to(gl.int32)
        rows = block * (GROUPS * GROUP_ROWS) + in_block
        if CODES:
            q_scale = gl.load(q_scale_ptr + head * QUERIES + rows)
            k_scales = k_scale_ptr + head * (KEYS // TK)
        m = gl.full([GROUP_ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(1, SCORES))
        total = gl.zeros([GROUP_ROWS], gl.float32, layout=gl.SliceLayout(1, SCORES))
        acc = gl.zeros([GROUP_ROWS, DP], gl.float32, layout=SUMS)
        mbarrier.wait(queries_filled(bars, group, BUFFERS), (t // gl.num_programs(0)) & 1)
        if blocks > 0:
            listed = gl.load(part_idx_ptr + first_part, mask=partial > 0, other=0)
            words = gl.load(part_tile_ptr + first_part, mask=partial > 0, other=0).to(gl.int64) * TILE_WORDS
            place = done % BUFFERS
            mbarrier.wait(filled(bars, 2 * place, BUFFERS), (done // BUFFERS) & 1)
            if PING_PONG:
                _my_turn(bars, done, group, BUFFERS)
            scores = _scores(q, k_ring, place, TK, DP, SCORES)
            if PING_PONG:
                mbarrier.arrive(turn_of(bars, 1 - group, BUFFERS))
            s = warpgroup_mma_wait(0, deps=(scores,)).to(gl.float32)
            mbarrier.arrive(emptied(bars, 2 * place, BUFFERS))
            factor = scale
            if CODES:
                full = gl.load(full_idx_ptr + first_full, mask=partial == 0, other=0)
                factor = q_scale * gl.load(k_scales + listed + full)
                s = s * factor.expand_dims(1)
            start, stop = hidden_start - listed * TK, text_stop - listed * TK
            s = _hide(s, words_ptr + words, start, stop, partial == 0, TK, SCORES)
            p, _alpha, m, total = _softmax(s, factor, m, total, CODES)
            weights = gl.convert_layout(p.to(v_ring.dtype), WEIGHTS)
            for i in range(1, partial):
                listed = gl.load(part_idx_ptr + first_part + i)
                words = gl.load(part_tile_ptr + first_part + i).to(gl.int64) * TILE_WORDS
                if CODES:
                    factor = q_scale * gl.load(k_scales + listed)
                acc, m, total, weights = _next(
                    acc, m, total, weights, q, k_ring, v_ring, bars, done + i,
                    words_ptr + words, hidden_start - listed * TK, text_stop - listed * TK, factor,
                    group, TK, DP, BUFFERS, True, PING_PONG, SCORES, SUMS, WEIGHTS,
                )  # fmt: skip
            for i in range(gl.maximum(partial, 1), blocks):
                if CODES:
                    factor = q_scale * gl.load(k_scales + gl.load(full_idx_ptr + (first_full + i - partial)))
                acc, m, total, weights = _next(
                    acc, m, total, weights, q, k_ring, v_ring, bars, done + i,
                    words_ptr, 0, 0, factor,
                    group, TK, DP, BUFFERS, False, PING_PONG, SCORES, SUMS, WEIGHTS,
                )  # fmt: skip
            last = (done + blocks - 1) % BUFFERS
            mbarrier.wait(filled(bars, 2 * last + 1, BUFFERS), ((done + blocks - 1) // BUFFERS) & 1)
            sums = _weighed(acc, weights, v_ring, last, TK, DP)
            acc = warpgroup_mma_wait(0, deps=(sums,))
            mbarrier.arrive(emptied(bars, 2 * last + 1, BUFFERS))
        mbarrier.arrive(queries_emptied(bars, group, BUFFERS))
        done += blocks

        sums = gl.convert_layout(total, gl.SliceLayout(1, SUMS))
        none = sums == 0.0  # attended, and acc may be 0 * NaN
        out = acc / gl.where(none, 1.0, sums).expand_dims(1)
        out = gl.where(none.expand_dims(1), 0.0, out)
        out_rows = gl.convert_layout(rows, gl.SliceLayout(1, SUMS))
        out_tile = out_ptr + b.to(gl.int64) * out_b + h.to(gl.int64) * out_h
        out_tile += (out_rows.to(gl.int64) * out_s).expand_dims(1) + d.expand_dims(0)
        inside = (out_rows < seq_len).expand_dims(1) & (d < D).expand_dims(0)
        gl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=inside)
        lse = m + gl.log2(total)
        if CODES:
            lse = lse + gl.load(shift_ptr + head * seq_len + rows, mask=rows < seq_len, other=0.0)
        lse = gl.where(total == 0.0, float("-inf"), lse * LN_2)
        gl.store(lse_ptr + head * seq_len + rows, lse, mask=rows < seq_len)
