"""Block-sparse attention, forward, in Gluon for Hopper: one warp copies, two groups of four multiply.

As `triton_tma`, with the work shared out among warps as in FlashAttention-3 (Shah et al., 2024,
arXiv:2407.08608). A producer warp has the copy engine fetch the listed key blocks into a ring of buffers; two
groups of consumer warps have 64 query rows each. A group issues Q K^T of a block, then P V of the block
before, and computes the softmax while tensor cores are at work: its own, and the other group's.

Partial blocks come first, then full ones, so that one block, the first of either, goes ahead of both loops.
Two ways are options of a launch: groups may take turns at the tensor cores, one multiplying while the other
computes its softmax (ping-pong), and a program for each multiprocessor may take tile after tile (persistent).

Gluon cannot be interpreted: without a GPU this is compiled, and its source executed with a stand-in for the
language by the tests, never run. It is looked at by `gpu_bench` before it is timed, and taken by its name, or
where a table of measurements names it. It computes 16-bit attention, and with Q and K in int8. Weights and
values in fp8 were tried: two levels of sums and the layout of their operands take twice the instructions.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.errors import UnavailableError
from dit_accel.masks.block_mask import BlockMask

from .formats import FORMATS, key_group
from .launch_order import mask_arguments
from .triton_configs import gluon_config, gpu, padded_head_dim
from .triton_forward import LAUNCH_OPTIONS, outputs, with_positive_scale
from .triton_gluon_warps import GROUP_ROWS, GROUPS, consume, make_barriers, produce
from .triton_quantize import quantize
from .triton_tma import copied, describable, described, launched

CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


# -- kernel --------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["tiles", "seq_len", "num_rows", "heads", "groups_b", "text_start", "text_stop"])
def _forward(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, launch_ptr, groups_ptr,
    full_start_ptr, full_count_ptr, full_idx_ptr,
    part_start_ptr, part_count_ptr, part_idx_ptr, part_tile_ptr, words_ptr, text_valid_ptr,
    q_scale_ptr, k_scale_ptr, shift_ptr,
    out_b, out_h, out_s, scale, tiles, seq_len, num_rows, heads, groups_b, text_start, text_stop,
    D: gl.constexpr, DP: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr, TQ: gl.constexpr, TK: gl.constexpr,
    ALIGN: gl.constexpr, BUFFERS: gl.constexpr, PING_PONG: gl.constexpr,
    QUERIES: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Arguments as in `triton_tma`; `BUFFERS` blocks are held, each of `TK` keys.

    A grid of one dimension, of as many programs as are wanted: each takes every so manieth of the `tiles`.
    """
    gl.static_assert(TQ == GROUPS * GROUP_ROWS)
    gl.static_assert(TQ == BQ)
    gl.static_assert(TK == BK)
    q_buf = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, GROUP_ROWS, DP], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [BUFFERS, 1, 1, BK, DP], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [BUFFERS, 1, 1, BK, DP], v_desc.layout)
    Q_BYTES: gl.constexpr = GROUP_ROWS * DP * (q_desc.dtype.primitive_bitwidth // 8)
    K_BYTES: gl.constexpr = BK * DP * (k_desc.dtype.primitive_bitwidth // 8)
    V_BYTES: gl.constexpr = BK * DP * (v_desc.dtype.primitive_bitwidth // 8)
    bars = make_barriers(BUFFERS)
    lists = (launch_ptr, groups_ptr, full_start_ptr, full_count_ptr, part_start_ptr, part_count_ptr)
    out_b, out_h, out_s = out_b.to(gl.int64) * ALIGN, out_h.to(gl.int64) * ALIGN, out_s.to(gl.int64) * ALIGN
    gl.warp_specialize(
        [
            (consume, (
                0, q_buf, k_ring, v_ring, bars, lists,
                part_idx_ptr, part_tile_ptr, full_idx_ptr, words_ptr, text_valid_ptr,
                q_scale_ptr, k_scale_ptr, shift_ptr, out_ptr, lse_ptr,
                out_b, out_h, out_s, scale, tiles, seq_len, heads, num_rows, groups_b, text_start, text_stop,
                BK, D, DP, BUFFERS, PING_PONG, QUERIES, KEYS,
            )),
            (consume, (
                1, q_buf, k_ring, v_ring, bars, lists,
                part_idx_ptr, part_tile_ptr, full_idx_ptr, words_ptr, text_valid_ptr,
                q_scale_ptr, k_scale_ptr, shift_ptr, out_ptr, lse_ptr,
                out_b, out_h, out_s, scale, tiles, seq_len, heads, num_rows, groups_b, text_start, text_stop,
                BK, D, DP, BUFFERS, PING_PONG, QUERIES, KEYS,
            )),
            (produce, (
                q_desc, k_desc, v_desc, q_buf, k_ring, v_ring, bars, lists, part_idx_ptr, full_idx_ptr,
                tiles, heads, num_rows, groups_b,
                BK, DP, BUFFERS, Q_BYTES, K_BYTES, V_BYTES,
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
    check_that_it_compiles(q)
    if q.numel() == 0:
        return outputs(q)
    q, scale = with_positive_scale(q, scale)
    if options is None:
        options = gluon_config(q.shape[3], mask.block_size, gpu(q.device))
    return launched(_forward, launch_arguments, q, k, v, mask, scale, text_valid, options)


def check_that_it_compiles(q: torch.Tensor, format: str | None = None) -> None:
    """For inputs like q.

    Raises:
        UnavailableError: it does not; the message says why.
    """
    if (reason := failure(q.shape[3], q.dtype, q.device, format)) is not None:
        raise UnavailableError(f"the Gluon kernel does not compile here: {reason}; use backend='triton-tma'")


@cache
def failure(head_dim: int, dtype: torch.dtype, device: torch.device, format: str | None = None) -> str | None:
    """Why the kernel does not compile for a device, or None; it is compiled once to know."""
    q = torch.empty(1, 1, 128, head_dim, dtype=dtype, device=device)
    q = q if describable(q) else copied(q)
    mask = BlockMask.from_token_mask(torch.ones(128, 128, dtype=torch.bool, device=device))
    known, codes = None if format is None else FORMATS[format], ()
    try:
        if known is not None:
            dim = held_head_dim(head_dim)
            given = {"scale": 1.0, "text": mask.text, "text_valid": None}
            codes = (quantize(q, q, q, known, group=key_group(mask.block_size[1]), dim=dim, **given),)
        grid, args, options = launch_arguments(
            q, q, q, q, q.new_empty(1, 1, 128, dtype=torch.float32), mask_arguments(mask, 1, 1), None, 1.0,
            mask.block_size, mask.text, gluon_config(head_dim, mask.block_size, gpu(device), known), *codes,
        )  # fmt: skip
        with torch.cuda.device_of(q):
            _forward.warmup(*args, grid=grid, **options, **LAUNCH_OPTIONS)
    except Exception as error:  # of an experimental compiler, whose versions differ in what they raise
        return f"{type(error).__name__}: {error}".strip()[:300]
    return None


def descriptor(x: torch.Tensor, rows: int, dim: int) -> Any:
    """As `triton_tma.descriptor`, with the layout in which shared memory holds a box."""
    size = x.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=min(128, dim * size), element_bitwidth=8 * size, rank=4)
    return TensorDescriptor(*described(x, rows, dim), layout)


def held_head_dim(head_dim: int) -> int:
    """head_dim as the kernel holds it, and codes of quantized inputs have it."""
    return max(64, padded_head_dim(head_dim))


def launch_arguments(q, k, v, out, lse, mask, text_valid, scale, block_size, text, options, quantized=None):
    """Grid, positional and keyword arguments of `_forward`, as in `triton_tma`."""
    order, groups, *_, words = mask
    (batch, heads, seq_len, head_dim), (bq, bk) = q.shape, block_size
    options = dict(options)
    if not words.numel():  # the first block's bits are looked at, and if it is a full one passed over
        words = words.new_zeros(1, bq, bk // 32)
    dim, tiles = held_head_dim(head_dim), batch * order.shape[1]
    extra, sizes = [None] * 3, {"QUERIES": None, "KEYS": None}
    if quantized is not None:
        q, k, v = quantized.q, quantized.k, quantized.v
        extra = [quantized.q_scale, quantized.k_scale, quantized.shift]
        sizes = {"QUERIES": q.shape[2], "KEYS": k.shape[2]}
    align = 8 if all(stride % 8 == 0 for stride in out.stride()[:3]) else 1
    args = (
        descriptor(q, GROUP_ROWS.value, dim), *(descriptor(x, bk, dim) for x in (k, v)), out, lse,
        *mask[:-1], words, text_valid, *extra, *(stride // align for stride in out.stride()[:3]),
        scale * math.log2(math.e), tiles, seq_len, -(-seq_len // bq), heads,
        heads if len(groups) > 1 else 0, *text,
    )  # fmt: skip
    sizes |= {"D": head_dim, "DP": dim, "BQ": bq, "BK": bk, "ALIGN": align}
    sizes |= {"BUFFERS": options["num_stages"], "num_warps": 4}  # of a group
    programs = min(tiles, multiprocessors(q.device)) if options.pop("PERSISTENT") else tiles
    return (programs,), args, options | sizes


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has, each of which holds one program at a time; 132 of a CPU, on which nothing runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
