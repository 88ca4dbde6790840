"""Block-sparse attention by the kernels in Triton: where they can run, known without Triton."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dit_accel.masks.block_mask import BlockMask

from . import triton_configs, tuned
from .formats import FORMATS
from .problem import Backend, Lengths, Problem

_log = logging.getLogger("dit_accel")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
QUERY_BLOCKS, KEY_BLOCKS = (64, 128), (32, 64, 128)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, problem: Problem, *, scale: float, text_valid: Lengths
) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_sparse_attention` by the kernel of `triton_forward`, or one that was measured to be faster."""
    from . import triton_forward, triton_quantized

    options = {"scale": scale, "text_valid": text_valid, "pv_threshold": problem.pv_threshold}
    name = "pointer" if triton_forward.INTERPRETED else _kernel(q, k, v, problem)
    if problem.quantization is not None:
        format = FORMATS[problem.quantization]
        return triton_quantized.quantized_attention(q, k, v, mask, format, kernel=name, **options)
    if name != "pointer":
        other = importlib.import_module(f"{__package__}.triton_{name}")
        return other.attention(q, k, v, mask, scale=scale, text_valid=text_valid)
    return triton_forward.attention(q, k, v, mask, **options)


def _kernel(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> str:
    """Which kernel computes a problem: the fastest measured in its format, where it can as things are.

    That with pointers where nothing was measured, in code that `torch.compile` looks into, with a threshold,
    and on tensors that the copy engine could not read without a copy of them.
    """
    if torch.compiler.is_compiling() or problem.pv_threshold is not None:
        return "pointer"
    gpu, format = triton_configs.gpu(problem.device), problem.quantization
    name = triton_configs.fastest_kernel(problem.head_dim, problem.dtype, problem.block_size, gpu, format)
    if name == "pointer":
        return name
    from .triton_tma import describable

    if not all(map(describable, (q, k, v) if format is None else (v,))):  # q and k are made codes
        return "pointer"
    if name == "gluon" and (reason := _gluon_failure(problem)) is not None:
        _say_once("the Gluon kernel, measured to be the fastest, gives way to the TMA kernel: %s", reason)
        return "tma"
    return name


def _gluon_failure(problem: Problem) -> str | None:
    """Why the kernel in Gluon cannot be had here, or None."""
    try:
        from . import triton_gluon
    except (ImportError, AttributeError) as error:  # Gluon is experimental, and names in it move
        return f"this Triton has another Gluon ({error})"
    return triton_gluon.failure(problem.head_dim, problem.dtype, problem.device, problem.quantization)


@cache
def _say_once(text: str, reason: str) -> None:
    _log.warning(text, reason)


def block_sizes(device: torch.device) -> dict[tuple[int, int], float]:
    """Blocks of 64 keys, and of 128 where their time was measured on this GPU."""
    sizes = {(128, 64): 1.0}
    if device.type == "cuda" and torch.cuda.is_available() and not torch.version.hip:
        wide = tuned.time_on_wide_blocks(torch.cuda.get_device_capability(device))
        if wide is not None:
            sizes[128, 128] = wide
    return sizes


def gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *given: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `native.gradients`, each part by the kernel that was measured to be the fastest."""
    from . import triton_gradients

    return triton_gradients.gradients(q, k, v, mask, *given, **options)


def condition(problem: Problem) -> str | None:
    """Why the kernels cannot run, or None: they need Triton, a GPU and blocks that they know."""
    try:
        from . import triton_forward
    except ImportError as error:
        return f"Triton could not be imported ({error}); install it with `pip install triton`"
    if not triton_forward.INTERPRETED:
        if problem.device.type != "cuda" or not torch.cuda.is_available():
            return (
                "the triton backend needs a GPU that PyTorch can use, got device "
                f"{str(problem.device)!r}; to interpret the kernel on a CPU (slow, for tests), set "
                "TRITON_INTERPRET=1 before Python starts"
            )
        reason = _reason(problem, triton_configs.gpu(problem.device))
        if reason is not None:
            return reason
    queries, keys = problem.block_size
    if queries not in QUERY_BLOCKS or keys not in KEY_BLOCKS:
        return (
            f"the triton backend needs a block size of {QUERY_BLOCKS} queries by {KEY_BLOCKS} keys, "
            f"got {problem.block_size}; build the mask with block_size=(128, 64)"
        )
    return None


def _reason(problem: Problem, gpu: triton_configs.Gpu) -> str | None:
    """Why the kernels cannot run on a GPU, or None."""
    if not isinstance(gpu, str):
        least = (8, 9) if problem.quantization == "int8-fp8" else (8, 0)
        if gpu >= least:
            return None
        named = "quantization='int8-fp8'" if least[1] else "the triton backend"
        return f"{named} needs compute capability {least[0]}.{least[1]} or newer, got {gpu[0]}.{gpu[1]}"
    if not gpu.startswith(triton_configs.AMD):
        return f"the triton backend was compiled for AMD's gfx942, gfx110x and gfx120x, got {gpu}"
    if problem.quantization is not None:
        return f"the triton backend quantizes on NVIDIA GPUs only, got {gpu}; use quantization=None"
    if problem.requires_grad and not gpu.startswith(triton_configs.AMD_WITH_GRADIENTS):
        return f"the triton backend's backward pass does not fit the registers of {gpu}; use backend='auto'"
    return None


BACKEND = Backend(
    "triton",
    attend,
    DTYPES,
    condition,
    block_sizes=block_sizes,
    automatic_on=("cuda",),
    formats=tuple(FORMATS),
    backward=True,
    gradients=gradients,
    traceable=True,
    skips_values=True,
)
