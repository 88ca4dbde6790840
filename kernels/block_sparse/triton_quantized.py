"""Block-sparse attention in a numeric format, in Triton: `triton_quantize`, then the kernel."""

from __future__ import annotations

import torch

from dit_accel.masks.block_mask import BlockMask

from . import triton_forward
from .formats import Format, key_group
from .triton_configs import padded_head_dim, quantized_config
from .triton_forward import (
    INTERPRETED,
    LAUNCH_OPTIONS,
    addressable,
    launch_arguments,
    mask_arguments,
    outputs,
)
from .triton_quantize import quantize


def quantized_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    format: Format,
    *,
    scale: float,
    text_valid: torch.Tensor | None,
    pv_threshold: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` in a numeric format."""
    if INTERPRETED and q.dtype == torch.bfloat16:  # which the interpreter does not know
        wide = (x.float() for x in (q, k, v))
        options = {"scale": scale, "text_valid": text_valid, "pv_threshold": pv_threshold}
        out, lse = quantized_attention(*wide, mask, format, **options)
        return out.to(q.dtype), lse
    q, k, v = addressable(q), addressable(k), addressable(v)
    capability = (9, 0) if INTERPRETED else torch.cuda.get_device_capability(q.device)
    group = key_group(mask.block_size[1])
    given = quantize(
        q, k, v, format, group=group, dim=padded_head_dim(q.shape[3]), scale=scale,
        text=mask.text, text_valid=text_valid,
    )  # fmt: skip
    out, lse = outputs(q)
    grid, args, options = launch_arguments(
        q, k, v, out, lse, mask_arguments(mask, *q.shape[:2]), text_valid, scale, mask.block_size, mask.text,
        quantized_config(q.shape[3], q.dtype, format, mask.block_size, capability), given, format.weights,
        pv_threshold,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        triton_forward._forward[grid](*args, **options, **LAUNCH_OPTIONS)
    return out, lse
