"""Block-sparse attention by the kernels in Triton: where they can run, known without Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.masks.block_mask import BlockMask

from .formats import FORMATS
from .problem import Backend, Lengths, Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
QUERY_BLOCKS, KEY_BLOCKS = (64, 128), (32, 64, 128)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, problem: Problem, *, scale: float, text_valid: Lengths
) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_sparse_attention` by the kernel of `triton_forward`."""
    from . import triton_forward, triton_quantized

    options = {"scale": scale, "text_valid": text_valid, "pv_threshold": problem.pv_threshold}
    if problem.quantization is not None:
        format = FORMATS[problem.quantization]
        return triton_quantized.quantized_attention(q, k, v, mask, format, **options)
    return triton_forward.attention(q, k, v, mask, **options)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *given: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`backward.gradients` by the kernels of `triton_backward`."""
    from . import triton_backward

    return triton_backward.gradients(q, k, v, mask, *given, **options)


def condition(problem: Problem) -> str | None:
    """Why the kernel cannot run, or None: it needs Triton, a GPU of 2020 or later and blocks it knows."""
    try:
        from . import triton_forward
    except ImportError as error:
        return f"Triton could not be imported ({error}); install it with `pip install triton`"
    if not triton_forward.INTERPRETED:
        if problem.device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
            return (
                "the triton backend needs an NVIDIA GPU that PyTorch can use, got device "
                f"{str(problem.device)!r}; to interpret the kernel on a CPU (slow, for tests), set "
                "TRITON_INTERPRET=1 before Python starts"
            )
        major, minor = torch.cuda.get_device_capability(problem.device)
        least = (8, 9) if problem.quantization == "int8-fp8" else (8, 0)
        if (major, minor) < least:
            named = "quantization='int8-fp8'" if least[1] else "the triton backend"
            return f"{named} needs compute capability {least[0]}.{least[1]} or newer, got {major}.{minor}"
    queries, keys = problem.block_size
    if queries not in QUERY_BLOCKS or keys not in KEY_BLOCKS:
        return (
            f"the triton backend needs a block size of {QUERY_BLOCKS} queries by {KEY_BLOCKS} keys, "
            f"got {problem.block_size}; build the mask with block_size=(128, 64)"
        )
    return None


BACKEND = Backend(
    "triton",
    attend,
    DTYPES,
    condition,
    block_sizes=lambda device: {(128, 64): 1.0},
    automatic_on=("cuda",),
    formats=tuple(FORMATS),
    backward=True,
    gradients=gradients,
    traceable=True,
    skips_values=True,
)
