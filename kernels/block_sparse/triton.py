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
"""

import math

import torch
import triton
import triton.language as tl
from torch.library import custom_op, triton_op, wrap_triton

from dit_accel.blockmask import BlockMask

MAX_HEAD_DIM = 256
QUERY_BLOCKS, KEY_BLOCKS = (64, 128), (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# (chip, bytes per element, largest padded head_dim): query rows and keys per step, warps, stages. Chosen by
# the registers, spills and shared memory that `python -m dit_accel.evals.compile_report` prints. A key block
# comes through two dependent loads (its index, itself), so 5 stages fetch two blocks ahead and 3 stages one.
CONFIGS = {
    ("sm_80", 2, 64): (128, 64, 4, 5),
    ("sm_80", 2, 128): (128, 64, 8, 5),
    ("sm_80", 2, 256): (64, 32, 8, 5),
    ("sm_90", 2, 64): (128, 64, 8, 5),
    ("sm_90", 2, 128): (128, 64, 8, 5),
    ("sm_90", 2, 256): (128, 32, 8, 5),
    ("sm_100", 2, 64): (128, 64, 8, 5),
    ("sm_100", 2, 128): (128, 64, 8, 5),
    ("sm_100", 2, 256): (128, 32, 8, 5),
    ("sm_120", 2, 64): (128, 64, 8, 3),
    ("sm_120", 2, 128): (128, 64, 8, 3),
    ("sm_120", 2, 256): (64, 32, 8, 3),
    ("any", 4, 64): (64, 32, 8, 2),
    ("any", 4, 128): (32, 32, 8, 1),
    ("any", 4, 256): (32, 32, 8, 1),
}


def chip(capability: tuple[int, int]) -> str:
    """The row of `CONFIGS` for a compute capability; 8.6 and 8.9 have as little shared memory as 12.0."""
    major, minor = capability
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_120"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")


def config(
    head_dim: int, dtype: torch.dtype, block_size: tuple[int, int], capability: tuple[int, int]
) -> dict[str, int]:
    """Tile and launch options of the kernel: `TQ`, `TK`, `num_warps`, `num_stages`."""
    padded = max(padded_head_dim(head_dim), 64)
    key = ("any" if dtype.itemsize == 4 else chip(capability), dtype.itemsize, padded)
    rows, keys, warps, stages = CONFIGS[key]
    tq, tk = min(rows, block_size[0]), min(keys, block_size[1])
    return {"TQ": tq, "TK": tk, "num_warps": max(4, warps * tq // rows), "num_stages": stages}


def padded_head_dim(head_dim: int) -> int:
    """head_dim as the kernel holds it: a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(head_dim))


# -- kernel --------------------------------------------------------------------------------------------------

LOWEST = tl.constexpr(-1e30)  # finite, so that the running maximum of a row without keys makes no NaN
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _bits(first, stop):
    """32-bit word with the bits of positions first <= j < stop set."""
    one = tl.full([], 1, tl.int64)
    below_first = (one << tl.minimum(tl.maximum(first, 0), 32)) - 1
    below_stop = (one << tl.minimum(tl.maximum(stop, 0), 32)) - 1
    return (below_stop & ~below_first).to(tl.int32)


@triton.jit
def _stream(
    acc, m, total, q, k_ptr, v_ptr, k_s, v_s, first, last, idx_ptr, tile_ptr, words_ptr,
    scale, kv_len, hidden_start, hidden_stop,
    D: tl.constexpr, DP: tl.constexpr, TK: tl.constexpr, SPLIT: tl.constexpr, TILE_WORDS: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """Attend the key blocks `idx_ptr[first:last]`, each in `SPLIT` steps of `TK` keys."""
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
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [TQ, TK]
        if PARTIAL:
            tile = tl.load(tile_ptr + i // SPLIT).to(tl.int64)
            words = words_ptr + tile * TILE_WORDS + i % SPLIT * (TK // 32)
            word = (tl.load(words) & ~_bits(hidden_start - start, hidden_stop - start))[:, None]  # [TQ, 1]
            for j in tl.static_range(32, TK, 32):
                right = tl.load(words + j // 32) & ~_bits(hidden_start - start - j, hidden_stop - start - j)
                word = tl.where(cols[None, :] < j, word, right[:, None])  # [TQ, TK]
            s = tl.where((word & (1 << (cols % 32))[None, :]) != 0, s, float("-inf"))

        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(tl.fma(s, scale, -m_new[:, None]))
        alpha = tl.exp2(m - m_new)
        total = total * alpha + tl.sum(p, 1)
        v = tl.load(v_tile + start64 * v_s, mask=inside, other=None if inside is None else 0.0)  # [TK, DP]
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")  # [TQ, DP]
        m = m_new
    return acc, m, total


@triton.jit(do_not_specialize=["seq_len", "kv_len", "num_rows", "heads", "text_start", "text_stop"])
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, launch_ptr, groups_ptr,
    full_ptr, full_idx_ptr, part_ptr, part_idx_ptr, part_tile_ptr, words_ptr, text_valid_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, out_b, out_h, out_s,
    scale, seq_len, kv_len, num_rows, heads, text_start, text_stop,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid (heads * num_rows * BQ / TQ, batch): each program computes `TQ` query rows of one head.

    Strides count `ALIGN` elements: Triton looks for arguments divisible by 16, vector loads need 8 elements.
    """
    item = tl.load(launch_ptr + tl.program_id(0) // (BQ // TQ))
    b = tl.program_id(1).to(tl.int64)
    h = (item // num_rows).to(tl.int64)
    block = item % num_rows
    in_block = tl.program_id(0) % (BQ // TQ) * TQ + tl.arange(0, TQ)
    rows = block * BQ + in_block
    rows64 = rows.to(tl.int64)
    d = tl.arange(0, DP)
    inside = (rows < seq_len)[:, None] & (d < D)[None, :]

    q_tile = q_ptr + (b * q_b + h * q_h) * ALIGN + (rows64[:, None] * (q_s * ALIGN) + d[None, :])
    q = tl.load(q_tile, mask=inside, other=0.0)  # [TQ, DP]
    k_ptr += (b * k_b + h * k_h) * ALIGN
    v_ptr += (b * v_b + h * v_h) * ALIGN
    k_s *= ALIGN
    v_s *= ALIGN
    words_ptr += in_block * (BK // 32)
    hidden_start = text_stop
    if text_valid_ptr is not None:
        hidden_start = text_start + tl.load(text_valid_ptr + b).to(tl.int32)
    block += tl.load(groups_ptr + h) * (num_rows + 1)
    first_full, last_full = tl.load(full_ptr + block), tl.load(full_ptr + block + 1)
    first_part, last_part = tl.load(part_ptr + block), tl.load(part_ptr + block + 1)

    m = tl.full([TQ], LOWEST, tl.float32)
    total = tl.zeros([TQ], tl.float32)
    acc = tl.zeros([TQ, DP], tl.float32)
    acc, m, total = _stream(
        acc, m, total, q, k_ptr, v_ptr, k_s, v_s, first_full, last_full, full_idx_ptr, part_tile_ptr,
        words_ptr, scale, kv_len, hidden_start, text_stop, D, DP, TK, BK // TK, BQ * (BK // 32), False,
    )  # fmt: skip
    acc, m, total = _stream(
        acc, m, total, q, k_ptr, v_ptr, k_s, v_s, first_part, last_part, part_idx_ptr, part_tile_ptr,
        words_ptr, scale, kv_len, hidden_start, text_stop, D, DP, TK, BK // TK, BQ * (BK // 32), True,
    )  # fmt: skip

    out = acc / tl.where(total > 0, total, 1.0)[:, None]  # [TQ, DP]
    out_tile = out_ptr + (b * out_b + h * out_h) * ALIGN + (rows64[:, None] * (out_s * ALIGN) + d[None, :])
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=inside)
    lse = tl.where(total > 0, (m + tl.log2(total)) * LN_2, float("-inf"))  # [TQ]
    tl.store(lse_ptr + (b * heads + h) * seq_len + rows, lse, mask=rows < seq_len)


# Triton reads TRITON_INTERPRET when `triton.jit` runs, so at import; setting it later changes nothing here.
INTERPRETED = not isinstance(_forward, triton.runtime.JITFunction)


# -- launch --------------------------------------------------------------------------------------------------


def unavailable(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_size: tuple[int, int]
) -> str | None:
    """Why the kernel cannot run on such inputs, or None if it can."""
    device = torch.device(device)
    if dtype not in DTYPES:
        return f"the triton backend computes fp16, bf16 and fp32, got {dtype}"
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim must be between 1 and {MAX_HEAD_DIM}, got {head_dim}"
    if not INTERPRETED:
        if device.type != "cuda" or torch.version.hip:
            return (
                f"the triton backend needs an NVIDIA GPU, got device {str(device)!r}; to interpret the "
                "kernel on a CPU (slow, for tests), set TRITON_INTERPRET=1 before Python starts"
            )
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"the triton backend needs compute capability 8.0 or newer, got {major}.{minor}"
    if block_size[0] not in QUERY_BLOCKS or block_size[1] not in KEY_BLOCKS:
        return (
            f"the triton backend needs a block size of {QUERY_BLOCKS} queries by {KEY_BLOCKS} keys, "
            f"got {tuple(block_size)}; build the mask with block_size=(128, 64)"
        )
    return None


def launch_order(mask: BlockMask, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (head * num_rows + row) in the order programs take them, and the group of each head: int32.

    Long rows (text attends everything) of all heads go first, so that none is left running alone at the end.
    Lengths are compared by powers of two: rows of similar length keep their order and share cached keys.
    Computed once, then kept in the mask.
    """
    key = ("triton launch order", heads)
    if key not in mask.cache:
        groups = mask.group_of_heads(heads)
        blocks = mask.full_ptr.diff(dim=1) + mask.part_ptr.diff(dim=1)  # (G, R)
        octave = (blocks + 1).double().log2().floor()[groups.long()].flatten()
        order = torch.argsort(octave, descending=True, stable=True)
        mask.cache[key] = order.int(), groups
    return mask.cache[key]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    scale: float,
    text_valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, like q, and the log-sum-exp of the scores (batch, heads, seq_len), fp32, natural log.

    Inputs are as in the public function, which has checked them.
    """
    if not scale > 0:  # the kernel takes maxima before it scales
        q, scale = q * (-1.0 if scale < 0 else 0.0), abs(scale) or 1.0
    if INTERPRETED and q.dtype == torch.bfloat16:  # Triton's interpreter would multiply the bit patterns
        out, lse = attention(q.float(), k.float(), v.float(), mask, scale=scale, text_valid=text_valid)
        return out.to(q.dtype), lse
    order, groups = launch_order(mask, q.shape[1])
    return _block_sparse_attention(
        _addressable(q), _addressable(k), _addressable(v), order, groups, mask.full_ptr, mask.full_idx,
        mask.part_ptr, mask.part_idx, mask.part_tile, mask.tiles.view(torch.int32), text_valid,
        scale, *mask.block_size, *mask.text,
    )  # fmt: skip


def _addressable(x: torch.Tensor) -> torch.Tensor:
    """x itself where the kernel can address it: last dimension contiguous, 32-bit offsets inside a block."""
    return x if x.stride(3) == 1 and x.stride(2) < 2**24 else x.contiguous()


def launch_arguments(
    q, k, v, out, lse, order, groups, full_ptr, full_idx, part_ptr, part_idx, part_tile, words, text_valid,
    scale, block_size, text, capability,
):  # fmt: skip
    """Grid, positional and keyword arguments of `_forward`."""
    (batch, heads, seq_len, head_dim), bq = q.shape, block_size[0]
    options = config(head_dim, q.dtype, block_size, capability)
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
    align = 8 if all(stride % 8 == 0 for stride in strides) else 1
    args = (
        q, k, v, out, lse, order, groups,
        full_ptr, full_idx, part_ptr, part_idx, part_tile, words, text_valid,
        *(stride // align for stride in strides),
        scale * math.log2(math.e), seq_len, k.shape[2], -(-seq_len // bq), heads, *text,
    )  # fmt: skip
    options |= {"D": head_dim, "DP": padded_head_dim(head_dim), "BQ": bq, "BK": block_size[1], "ALIGN": align}
    return (order.shape[0] * (bq // options["TQ"]), batch), args, options


def _outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q)
    out = out if out.stride(3) == 1 else torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    order: torch.Tensor,
    groups: torch.Tensor,
    full_ptr: torch.Tensor,
    full_idx: torch.Tensor,
    part_ptr: torch.Tensor,
    part_idx: torch.Tensor,
    part_tile: torch.Tensor,
    words: torch.Tensor,
    text_valid: torch.Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
    text_start: int,
    text_stop: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _outputs(q)
    capability = (8, 0) if INTERPRETED else torch.cuda.get_device_capability(q.device)
    grid, args, options = launch_arguments(
        q, k, v, out, lse, order, groups,
        full_ptr, full_idx, part_ptr, part_idx, part_tile, words, text_valid,
        scale, (block_q, block_k), (text_start, text_stop), capability,
    )  # fmt: skip
    kernel = _forward if INTERPRETED else wrap_triton(_forward)
    kernel[grid](*args, **options)
    return out, lse


# torch.compile looks through a triton_op at its kernel; an interpreted kernel has to hide in an opaque op.
_block_sparse_attention = (custom_op if INTERPRETED else triton_op)(
    "dit_accel::block_sparse_attention", _block_sparse_attention, mutates_args=()
)


@_block_sparse_attention.register_fake
def _(q, *_args, **_kwargs):
    return _outputs(q)
