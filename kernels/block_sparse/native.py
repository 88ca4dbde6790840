"""Block-sparse attention compiled for this CPU: `native.cpp`, by the system's C++ compiler at first use.

Triton and `torch.compile` likewise need a compiler where they run; nothing is compiled at installation. The
library is kept in the user's cache folder, named by its source, the compiler and the processor's features.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

from dit_accel.blockmask import BlockMask

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PANEL = 16  # keys that are packed together

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast")
_LOG2_E = 1.4426950408889634

_log = logging.getLogger("dit_accel")


def unavailable(
    device: torch.device, dtype: torch.dtype, block_size: tuple[int, int], requires_grad: bool = False
) -> str | None:
    """Why this path cannot run with these inputs, or None; compiles it if nothing else speaks against it."""
    if device.type != "cpu":
        return f"native runs on a CPU only, got {device.type!r}"
    if dtype not in DTYPES:
        return f"native supports float16, bfloat16 and float32, got {dtype}"
    if block_size[1] % PANEL:
        return f"native needs key blocks of a multiple of {PANEL} tokens, got block size {block_size}"
    if requires_grad:
        return "native has no backward pass; use backend='gather'"
    return _reason()


@torch.compiler.disable
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    scale: float,
    text_valid: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`block_sparse_attention` in compiled code; lse is None unless asked for.

    bf16 stays bf16 where the processor multiplies its matrices (AMX), with scores, sums and results added up
    in fp32; elsewhere bf16, and fp16 always, are computed in fp32.
    """
    library, _ = _library()
    tiles = q.dtype == torch.bfloat16 and library.has_tiles()
    dtype = q.dtype if tiles else torch.float32
    inputs = [x.to(dtype) if x.stride(3) == 1 else x.to(dtype).contiguous() for x in (q, k, v)]
    batch, heads, _, dim = q.shape
    panels = batch * heads * mask.num_cols * mask.block_size[1]
    packed = [torch.empty(panels * -(-dim // 32) * 32, dtype=dtype) for _ in range(2)]
    out = torch.empty_like(inputs[0])  # with q's strides, where they leave no gaps
    out = out if out.stride(3) == 1 else torch.empty(q.shape, dtype=dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    groups = mask.group_of_heads(heads)
    valid = None if text_valid is None else text_valid.long().contiguous()
    pointers = (*inputs, *packed, out, lse)
    lists = (mask.full_ptr, mask.full_idx, mask.part_ptr, mask.part_idx, mask.part_tile, groups, _rows(mask))
    job = _Job(
        *(None if x is None else x.data_ptr() for x in pointers),
        *((ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (*inputs, out)),
        *(x.data_ptr() for x in lists),
        mask.tiles.data_ptr(),
        None if valid is None else valid.data_ptr(),
        *(batch, heads, mask.seq_len, mask.kv_len, dim, *mask.block_size, *mask.text),
        torch.get_num_threads(),
        scale * _LOG2_E,
    )
    (library.attend_bfloat16 if tiles else library.attend_float32)(ctypes.byref(job))
    return out.to(q.dtype), lse


class _Job(ctypes.Structure):
    """As in native.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_packed", "v_packed", "out", "lse")),
        *((name, ctypes.c_int64 * 3) for name in ("q_stride", "k_stride", "v_stride", "out_stride")),
        *((name, ctypes.c_void_p) for name in ("full_ptr", "full_idx", "part_ptr", "part_idx", "part_tile")),
        *((name, ctypes.c_void_p) for name in ("group_of_head", "row_order", "tiles", "text_valid")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "seq_len", "kv_len", "dim")),
        *((name, ctypes.c_int64) for name in ("block_q", "block_k", "text_start", "text_stop", "threads")),
        ("factor", ctypes.c_float),
    ]


def _rows(mask: BlockMask) -> torch.Tensor:
    """Query blocks of each group, longest first: int32 (G, R), kept in `mask.cache`."""
    if "native" not in mask.cache:
        with torch.inference_mode(False):
            length = (mask.full_ptr.diff(dim=1) + mask.part_ptr.diff(dim=1)).long()
            mask.cache["native"] = length.argsort(dim=1, descending=True, stable=True).int().contiguous()
    return mask.cache["native"]


# -- compilation ---------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _reason() -> str | None:
    return _library()[1]


@cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled library, or None and the reason why there is none."""
    names = (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")
    reasons = []
    for compiler in dict.fromkeys(filter(None, map(shutil.which, names))):
        try:
            return _loaded(_compiled(compiler)), None
        except subprocess.CalledProcessError as error:
            reasons.append(f"native could not be compiled: `{compiler}` says {error.stderr.strip()[-500:]}")
        except (OSError, RuntimeError) as error:  # a RuntimeError: there is no home folder
            why = f"native could not be kept or loaded ({error}); set XDG_CACHE_HOME to a folder for it"
            reasons.append(why)
    missing = "native compiles C++ and no compiler was found; install g++ or clang++"
    return None, "; ".join(dict.fromkeys(reasons)) or missing


def _loaded(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("attend_float32", "attend_bfloat16"):
        getattr(library, name).argtypes = (ctypes.POINTER(_Job),)
        getattr(library, name).restype = None
    return library


def _compiled(compiler: str) -> Path:
    """The shared library for this processor and compiler, made if the cache folder has none."""
    command = [compiler, *_FLAGS]
    target = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])  # the processor's features, the version
    name = hashlib.sha256(_SOURCE.read_bytes() + " ".join(command).encode() + target.encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_accel"
    path = folder / f"native-{name[:16]}.so"
    if not path.exists():
        start = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:  # other processes see it whole or not at all
            made = Path(partial) / path.name
            _run([*command, str(_SOURCE), "-o", str(made)])
            made.replace(path)
        _log.info("compiled attention for this CPU in %.1f s: %s", time.perf_counter() - start, path)
    return path


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
