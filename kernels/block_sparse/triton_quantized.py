"""Block-sparse attention in a numeric format, in Triton: `triton_quantize`, then the kernel."""

from __future__ import annotations

import torch

from dit_accel.masks.block_mask import BlockMask

from . import triton_forward
from .formats import Format, key_group
from .triton_configs import padded_head_dim, quantized_config, tma_config
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
    kernel: str = "pointer",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` in a numeric format, by one of the kernels that `tuned` names.

    `"tma"` computes formats whose values stay in 16 bits, without a threshold.
    """
    if INTERPRETED and q.dtype == torch.bfloat16:  # which the interpreter does not know
        wide = (x.float() for x in (q, k, v))
        options = {"scale": scale, "text_valid": text_valid, "pv_threshold": pv_threshold, "kernel": kernel}
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
    if kernel == "tma":
        launch_by_tma(q, k, v, out, lse, mask, text_valid, given, capability)
        return out, lse
    grid, args, options = launch_arguments(
        q, k, v, out, lse, mask_arguments(mask, *q.shape[:2]), text_valid, scale, mask.block_size, mask.text,
        quantized_config(q.shape[3], q.dtype, format, mask.block_size, capability), given, format.weights,
        pv_threshold,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        triton_forward._forward[grid](*args, **options, **LAUNCH_OPTIONS)
    return out, lse


def launch_by_tma(q, k, v, out, lse, mask: BlockMask, text_valid, given, capability: tuple[int, int]) -> None:
    """The kernel whose keys the copy engine fetches, of codes, a group of keys a step."""
    from . import triton_tma

    v = v if triton_tma.describable(v) else triton_tma.copied(v)
    grid, args, options = triton_tma.launch_arguments(
        q, k, v, out, lse, mask_arguments(mask, *q.shape[:2]), text_valid, 1.0, mask.block_size, mask.text,
        tma_config(q.shape[3], (mask.block_size[0], given.group), capability), given,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        triton_tma._forward[grid](*args, **options, **LAUNCH_OPTIONS)
