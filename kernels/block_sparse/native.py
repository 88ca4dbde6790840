"""Block-sparse attention and its gradients compiled for this CPU: calls `native.cpp`."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dit_accel.errors import UnavailableError
from dit_accel.masks.block_mask import BlockMask

from . import cpp_library
from .formats import key_group
from .problem import Backend, Lengths, Problem
from .quantized import LOG2_E
from .tail import Tail

PANEL = 16  # keys that are packed together
KEYS = 64  # keys that are computed at once
PRODUCTS = ("plain", "vnni", "amx")  # of int8, from slow to fast
POOLED_AT_ONCE = 64  # keys that a thread packs

_SOURCE = Path(__file__).with_suffix(".cpp")
_GRADIENTS = "gradients_float32"
_FUNCTIONS = tuple(f"attend_{kind}{dtype}" for kind in ("", "int8_") for dtype in ("float32", "bfloat16"))


def condition(problem: Problem) -> str | None:
    """Why the compiled code cannot run, or None; compiles it if nothing else speaks against it."""
    if problem.device.type != "cpu":
        return f"native runs on a CPU only, got {problem.device.type!r}"
    if problem.block_size[1] % PANEL:
        return f"native needs key blocks of a multiple of {PANEL} tokens, got block size {problem.block_size}"
    if problem.pv_threshold is not None and problem.block_size[1] % KEYS:
        return (
            f"native judges {KEYS} keys at once for `pv_threshold`, got block size {problem.block_size}; use "
            f"key blocks of a multiple of {KEYS} tokens"
        )
    return _reason()


@torch.compiler.disable
def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, problem: Problem, *, scale: float, text_valid: Lengths
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`block_sparse_attention` in compiled code; lse is None unless asked for.

    bf16 stays bf16 where the processor multiplies its matrices (AMX), with scores, sums and results added up
    in fp32; elsewhere bf16, and fp16 always, are computed in fp32. Quantized, q and k are multiplied in int8
    by the best instructions that the processor has, the rest as without. For a `pv_threshold` it judges 64
    keys for 6 rows, or 16 where tiles or int8 are multiplied.
    """
    library, _ = _library()
    tiles = q.dtype == torch.bfloat16 and library.has_tiles()
    dtype = q.dtype if tiles else torch.float32
    inputs = [x.to(dtype) if x.stride(3) == 1 else x.to(dtype).contiguous() for x in (q, k, v)]
    batch, heads, _, dim = q.shape
    tail = None if problem.tail is None else Tail.of(mask)
    mask = mask if tail is None else tail.whole or mask
    keys, threads = batch * heads * mask.num_cols * mask.block_size[1], torch.get_num_threads()
    room = 0 if tail is None else threads * POOLED_AT_ONCE
    packed = torch.empty(2, (keys + room) * -(-dim // 32) * 32, dtype=dtype, device="cpu")
    quantized, channels, group = problem.quantization is not None, None, 0
    if quantized:
        group, stride = key_group(mask.block_size[1]), -(-dim // 16) * 16
        k_packed = torch.empty(
            keys // PANEL, -(-dim // 64) * 64 * PANEL + 128, dtype=torch.uint8, device="cpu"
        )
        channels = torch.empty(batch * heads, 4, stride, dtype=torch.float32, device="cpu")
        packed = k_packed, packed[1]
    sums = [] if tail is None else _sums(batch * heads, keys // PANEL, tail, dim)
    out = torch.empty_like(inputs[0])  # with q's strides, where they leave no gaps
    out = out if out.stride(3) == 1 else torch.empty(q.shape, dtype=dtype, device="cpu")
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device="cpu") if problem.return_lse else None
    threshold = math.inf if problem.pv_threshold is None else problem.pv_threshold
    job = _job((*inputs, *packed, out), lse, mask, text_valid, tail, sums, scale, group, channels, threshold)
    name = f"attend_{'int8_' if quantized else ''}{'bfloat16' if tiles else 'float32'}"
    getattr(library, name)(ctypes.byref(job))
    return out.to(q.dtype), lse


@torch.compiler.disable
def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    *,
    scale: float,
    text_valid: Lengths = None,
    tail: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, in their dtype, in compiled code that computes in fp32.

    The same on every run with the same number of threads; with another, sums may be of another order.

    Args:
        q, k, v, mask, scale, text_valid, tail: as of `block_sparse_attention`.
        out, lse: what it returned, (batch, heads, seq_len, head_dim) and (batch, heads, seq_len).
        dout, dlse: gradients of them; None: lse has none.
    """
    library, _ = _library()
    given, threads = q.dtype, torch.get_num_threads()
    q, k, v, out, dout = (
        x.float() if x.stride(3) == 1 else x.float().contiguous() for x in (q, k, v, out, dout)
    )
    lse, dlse = lse.float().contiguous(), None if dlse is None else dlse.float().contiguous()
    batch, heads, _, dim = q.shape
    pooled = None if tail is None else Tail.of(mask)
    mask = mask if pooled is None else pooled.whole or mask
    planes, keys, stride = batch * heads, mask.num_cols * mask.block_size[1], -(-dim // 16) * 16
    room = 0 if pooled is None else threads * POOLED_AT_ONCE

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device="cpu")

    packed = empty(planes * keys + room, 2 * stride), empty(planes * keys + room, stride)
    dq = empty(*q.shape)
    dk, dv = (empty(batch, heads, keys, stride) for _ in range(2))
    apart, sums, passed = empty(threads - 1, 2, keys, stride), [], None
    if pooled is not None:
        sums = _sums(planes, planes * keys // PANEL, pooled, dim)
        groups, blocks = pooled.dropped.shape[2:]
        passed = empty(planes + threads - 1, groups * (blocks + 1), 2, stride)
    job = _GradientsJob(
        _job((q, k, v, *packed, out), lse, mask, text_valid, pooled, sums, scale),
        *(None if x is None else x.data_ptr() for x in (dout, dlse, dq, dk, dv, apart, passed)),
        *(_Strides(*x.stride()[:3]) for x in (dout, dq)),
        scale,
    )
    library.gradients_float32(ctypes.byref(job))
    dk, dv = (x[:, :, : mask.kv_len, :dim] for x in (dk, dv))
    return dq.to(given), dk.to(given), dv.to(given)


def _job(
    tensors: tuple[Tensor, ...],
    lse: Tensor | None,
    mask: BlockMask,
    text_valid: Lengths,
    tail: Tail | None,
    sums: list[Tensor],
    scale: float,
    group: int = 0,
    channels: Tensor | None = None,
    threshold: float = math.inf,
) -> _Job:
    """What the compiled code is told; `tensors` are q, k, v, room for packed keys and values, and out."""
    q, k, v, _, _, out = tensors
    batch, heads, _, dim = q.shape
    return _Job(
        *map(torch.Tensor.data_ptr, tensors),
        None if lse is None else lse.data_ptr(),
        *(_Strides(*x.stride()[:3]) for x in (q, k, v, out)),
        *mask.derived(_Launch, lambda: _Launch.of(mask, batch, heads), batch, heads).pointers,
        None if text_valid is None else text_valid.data_ptr(),
        *((None, None, None, 0, 0, 0) if tail is None else _of_tail(tail, sums)),
        *(batch, heads, mask.seq_len, mask.kv_len, dim, *mask.block_size, *mask.text),
        torch.get_num_threads(),
        scale * LOG2_E,
        *(group, PRODUCTS.index(products()), None if channels is None else channels.data_ptr()),
        threshold,
    )


def _sums(planes: int, panels: int, tail: Tail, dim: int) -> list[Tensor]:
    """Room for sums of keys and of values, over all panels and over the groups of each head."""
    counts = (panels, planes * tail.dropped.shape[2])
    return [torch.empty(n, 2, -(-dim // 16) * 16, dtype=torch.float32, device="cpu") for n in counts]


def _of_tail(tail: Tail, sums: list[Tensor]) -> tuple[int, ...]:
    """As `_Job` has it from `dropped` to `part_blocks`."""
    return tail.dropped.data_ptr(), *(x.data_ptr() for x in sums), *tail.dropped.shape[2:], tail.part


_Strides = ctypes.c_int64 * 3


class _Job(ctypes.Structure):
    """As in native.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_packed", "v_packed", "out", "lse")),
        *((name, _Strides) for name in ("q_stride", "k_stride", "v_stride", "out_stride")),
        *((name, ctypes.c_void_p) for name in ("full_start", "full_count", "full_index")),
        *((name, ctypes.c_void_p) for name in ("part_start", "part_count", "part_index", "part_tile")),
        *((name, ctypes.c_void_p) for name in ("group_of_plane", "row_order", "tiles", "text_valid")),
        *((name, ctypes.c_void_p) for name in ("dropped", "sums", "group_sums")),
        *((name, ctypes.c_int64) for name in ("groups", "group_blocks", "part_blocks")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "seq_len", "kv_len", "dim")),
        *((name, ctypes.c_int64) for name in ("block_q", "block_k", "text_start", "text_stop", "threads")),
        ("factor", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("group", "products")),
        ("channels", ctypes.c_void_p),
        ("pv_threshold", ctypes.c_float),
    ]


class _GradientsJob(ctypes.Structure):
    """As in native_backward.h."""

    _fields_ = [
        ("job", _Job),
        *((name, ctypes.c_void_p) for name in ("dout", "dlse", "dq", "dk", "dv", "apart", "pooled")),
        *((name, _Strides) for name in ("dout_stride", "dq_stride")),
        ("scale", ctypes.c_float),
    ]


@dataclass(frozen=True, eq=False)
class _Launch:
    """What the compiled code reads of a mask.

    Attributes:
        groups: mask group of each head of each sample, int32 (batch, heads).
        rows: query blocks of each mask group, longest first, int32 (G, R).
        pointers: addresses as `_Job` has them from `full_start` to `tiles`.
    """

    groups: torch.Tensor
    rows: torch.Tensor
    pointers: tuple[int, ...]

    @classmethod
    def of(cls, mask: BlockMask, batch: int, heads: int) -> _Launch:
        groups = mask.group_of_heads(batch, heads).expand(batch, heads).contiguous()
        length = mask.full.count + mask.partial.count
        rows = length.argsort(dim=1, descending=True, stable=True).int().contiguous()
        lists = (*mask.full.tensors().values(), *mask.partial.tensors().values())
        return cls(groups, rows, tuple(x.data_ptr() for x in (*lists, groups, rows, mask.tiles)))


# -- compilation ---------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _reason() -> str | None:
    return _library()[1]


@cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled library, or None and the reason why there is none."""
    try:
        library = cpp_library.load(_SOURCE, (*_FUNCTIONS, _GRADIENTS, "has_tiles", "products"))
    except UnavailableError as error:
        return None, str(error)
    for name in (*_FUNCTIONS, _GRADIENTS):
        function = getattr(library, name)
        told = _GradientsJob if name == _GRADIENTS else _Job
        function.argtypes, function.restype = (ctypes.POINTER(told),), None
    library.products.restype = ctypes.c_int64
    return library, None


def products() -> str:
    """The fastest instructions for products of int8 that this processor has, one of `PRODUCTS`.

    It is asked when it runs, whatever the library was compiled for.
    """
    library, _ = _library()
    return PRODUCTS[0 if library is None else library.products()]


BACKEND = Backend(
    "native",
    attend,
    dtypes=(torch.float16, torch.bfloat16, torch.float32),
    condition=condition,
    # small blocks cost little more per pair and save padding
    block_sizes=lambda device: {(64, 16): 1.0, (32, 16): 1.06},
    automatic_on=("cpu",),
    formats=("int8",),
    backward=True,
    gradients=gradients,
    own_tail=True,
    skips_values=True,
)
