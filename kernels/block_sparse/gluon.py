"""The backend `"triton-gluon"`: the kernel for Hopper in Gluon; known without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.masks.block_mask import BlockMask

from . import tma, triton_configs
from .formats import FORMATS
from .problem import Backend, Lengths, Problem

NAME = "triton-gluon"
MAX_HEAD_DIM = 128


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, problem: Problem, *, scale: float, text_valid: Lengths
) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_sparse_attention` by the kernel of `triton_gluon`; `UnavailableError` if it does not compile."""
    from . import triton_gluon, triton_quantized

    if problem.quantization is not None:
        format, options = FORMATS[problem.quantization], {"scale": scale, "text_valid": text_valid}
        return triton_quantized.quantized_attention(q, k, v, mask, format, kernel="gluon", **options)
    return triton_gluon.attention(q, k, v, mask, scale=scale, text_valid=text_valid)


def condition(problem: Problem) -> str | None:
    """Why the kernel cannot run, or None: it needs Hopper, Gluon, and blocks of 128 x 64."""
    reason = tma.condition(problem)
    if reason is not None:
        return reason
    from .triton_forward import INTERPRETED

    if INTERPRETED:
        return f"{NAME} cannot be interpreted: Gluon has no interpreter; unset TRITON_INTERPRET"
    try:
        from . import triton_gluon  # noqa: F401
    except (ImportError, AttributeError) as error:  # Gluon is experimental, and names in it move
        return f"{NAME} needs the Gluon of Triton 3.6 to 3.9 ({error}); use backend='triton-tma'"
    if (reason := tma.unsuited(triton_configs.gpu(problem.device), NAME, (9,))) is not None:
        return reason
    if problem.block_size != triton_configs.GLUON_BLOCKS:
        known = triton_configs.GLUON_BLOCKS
        return f"{NAME} needs blocks of {known}, got {problem.block_size}; use backend='triton-tma'"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"{NAME} takes head_dim up to {MAX_HEAD_DIM}, got {problem.head_dim}; use backend='triton-tma'"
    return None


BACKEND = Backend(
    NAME,
    attend,
    dtypes=(torch.float16, torch.bfloat16),
    condition=condition,
    formats=tuple(name for name, format in FORMATS.items() if format.weights is None),
    backward=True,
    gradients=tma.gradients,
)
