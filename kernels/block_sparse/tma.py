"""The backend `"triton-tma"`: the Triton kernel whose keys the copy engine fetches; known without Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.masks.block_mask import BlockMask

from . import triton, triton_configs
from .formats import FORMATS
from .problem import Backend, Lengths, Problem

NAME = "triton-tma"
FORMATS_HERE = ("int8", "int8-fp8")  # with values in whole numbers it spills on sm_100 under Triton 3.6
MAJORS = (9, 10)  # compute capabilities whose copy engine and tensor cores the kernel was compiled for


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, problem: Problem, *, scale: float, text_valid: Lengths
) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_sparse_attention` by the kernel of `triton_tma`."""
    from . import triton_quantized, triton_tma

    if problem.quantization is not None:
        format, options = FORMATS[problem.quantization], {"scale": scale, "text_valid": text_valid}
        return triton_quantized.quantized_attention(q, k, v, mask, format, kernel="tma", **options)
    return triton_tma.attention(q, k, v, mask, scale=scale, text_valid=text_valid)


def gradients(*given: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `native.gradients`, by the kernels of `triton_tma_backward`."""
    from . import triton_gradients

    return triton_gradients.gradients(*given, kernel="tma", **options)


def condition(problem: Problem) -> str | None:
    """Why the kernel cannot run, or None: it needs what the one with pointers does, and a copy engine."""
    reason = triton.condition(problem)
    if reason is not None:
        return reason
    try:
        from .triton_tma import INTERPRETED
    except ImportError as error:
        return f"{NAME} needs the host descriptors of Triton 3.4 or newer ({error}); use backend='triton'"
    return None if INTERPRETED else unsuited(triton_configs.gpu(problem.device), NAME, MAJORS)


def unsuited(gpu: triton_configs.Gpu, name: str, majors: tuple[int, ...]) -> str | None:
    """Why a kernel that was written for GPUs of these major capabilities cannot run on one, or None."""
    if not isinstance(gpu, str) and gpu[0] in majors:
        return None
    what = gpu if isinstance(gpu, str) else f"compute capability {gpu[0]}.{gpu[1]}"
    known = " and ".join(f"{major}.x" for major in majors)
    return f"{name} was written for compute capability {known}, got {what}; use backend='triton'"


BACKEND = Backend(
    NAME,
    attend,
    dtypes=(torch.float16, torch.bfloat16),
    condition=condition,
    formats=FORMATS_HERE,
    backward=True,
    gradients=gradients,
)
