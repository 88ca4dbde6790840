"""Block-sparse attention through compiled FlexAttention, with the block lists and tiles of the same mask."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dit_accel.masks.block_mask import BlockMask

from .attending import Attending
from .problem import Backend, Lengths, Problem

# How many shapes and masks a process compiles before another is an error. PyTorch's own limit is 8, and from
# there on it would go on uncompiled, with all scores in memory.
SHAPES = 128


def condition(problem: Problem) -> str | None:
    """Why FlexAttention cannot run, or None: on a CPU it can do less, and compiles C++."""
    if problem.device.type == "cuda":
        return None
    if problem.device.type != "cpu":
        return f"FlexAttention is compiled for CUDA and CPU devices only, got {problem.device.type!r}"
    if problem.return_lse:
        return "FlexAttention on a CPU does not return lse"
    if problem.requires_grad:
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

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@dataclass(frozen=True, eq=False)
class _FlexMask:
    """A mask as FlexAttention takes it, and which queries attend to anything.

    Attributes:
        mask: a `torch.nn.attention.flex_attention.BlockMask`.
        attending: the queries.
    """

    mask: Any
    attending: Attending


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, problem: Problem, *, scale: float, text_valid: Lengths
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`block_sparse_attention` by FlexAttention; compiles for seconds on the first call with each shape."""
    own = mask.derived(_FlexMask, lambda: _FlexMask(mask.to_flex(), Attending.of(mask)))
    block_mask, attends = own.mask, own.attending.rows(text_valid)
    if text_valid is not None:
        block_mask = _with_text_valid(block_mask, mask.text, text_valid)
    with torch._dynamo.config.patch(recompile_limit=SHAPES):
        result = _compiled()(q, k, v, block_mask=block_mask, scale=scale, return_lse=problem.return_lse)
    out, lse = result if problem.return_lse else (result, None)
    # FlexAttention multiplies what is masked by 0, which leaves NaN
    return torch.where(attends[..., None], out, 0), lse


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


BACKEND = Backend(
    "flex",
    attend,
    dtypes=(torch.float16, torch.bfloat16, torch.float32),
    condition=condition,
    backward=True,
)
