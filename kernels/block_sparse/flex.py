"""Block-sparse attention through compiled FlexAttention, with the block lists and tiles of the same mask."""

from __future__ import annotations

import shutil
import sys
from functools import cache

import torch

from dit_accel.blockmask import BlockMask

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unavailable(
    device: torch.device,
    dtype: torch.dtype,
    return_lse: bool = False,
    requires_grad: bool = False,
) -> str | None:
    """Why FlexAttention cannot run with these inputs, or None."""
    if dtype not in DTYPES:
        return f"FlexAttention supports float16, bfloat16 and float32, got {dtype}"
    if device.type == "cuda":
        return None
    if device.type != "cpu":
        return f"FlexAttention is compiled for CUDA and CPU devices only, got {device.type!r}"
    if return_lse:
        return "FlexAttention on a CPU does not return lse"
    if requires_grad:
        return "FlexAttention on a CPU has no backward pass"
    if sys.platform == "darwin" or not torch.cpu._is_avx2_supported():
        return "FlexAttention on a CPU needs Linux or Windows on a processor with AVX2"
    if not _compiler():
        return "FlexAttention on a CPU compiles C++ and no compiler was found; install g++ or clang++"
    return None


@cache
def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("g++", "clang++", "c++", "cl"))), None)


@cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


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
    """`block_sparse_attention` by FlexAttention; compiles for seconds on the first call with each shape."""
    if "flex" not in mask.cache:
        mask.cache["flex"] = mask.to_flex()
    block_mask = mask.cache["flex"]
    if text_valid is not None:
        block_mask = _with_text_valid(block_mask, mask.text, text_valid)
    result = _compiled()(q, k, v, block_mask=block_mask, scale=scale, return_lse=return_lse)
    return result if return_lse else (result, None)


def _with_text_valid(block_mask, text: tuple[int, int], text_valid: torch.Tensor):
    """The same blocks, with a mask function that also hides each sample's padded text.

    Text never lies in full blocks, so that hiding it in the mask function is enough.
    """
    start, stop = text
    tiles = block_mask.mask_mod

    def mask_mod(b, h, q, k):
        return tiles(b, h, q, k) & ((k < start + text_valid[b]) | (k >= stop))

    return type(block_mask).from_kv_blocks(
        block_mask.kv_num_blocks,
        block_mask.kv_indices,
        block_mask.full_kv_num_blocks,
        block_mask.full_kv_indices,
        BLOCK_SIZE=block_mask.BLOCK_SIZE,
        mask_mod=mask_mod,
        seq_lengths=block_mask.seq_lengths,
    )
