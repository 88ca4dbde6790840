"""Block-sparse attention by FlashAttention-4 (`flash-attn-4`), with the lists and tiles of the same mask.

Its kernels, in CuTe for Hopper and Blackwell, take what a mask is made of one to one: for each query block
the partial and the full key blocks, and for elements of partial ones a function, which looks the bit up in a
tile. Interface as of flash-attn-4 of August 2026: `flash_attn.cute.interface.flash_attn_func`,
`flash_attn.cute.block_sparsity.BlockSparseTensorsTorch`. Not run here: it needs such a GPU.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dit_accel.masks.block_lists import BlockLists
from dit_accel.masks.block_mask import BlockMask

from .attending import Attending
from .problem import Backend, Lengths, Problem

NAME = "fa4"
BLOCK_SIZES = {9: (128, 128), 10: (256, 128), 11: (256, 128)}  # by major compute capability: its own tiles
MAX_HEAD_DIM = 128  # beyond it, its tiles have other sizes
NEEDED = {"mask_mod", "block_sparse_tensors", "aux_tensors", "return_lse", "softmax_scale"}


def condition(problem: Problem) -> str | None:
    """Why FlashAttention-4 cannot run, or None: it needs its package, a GPU, and blocks as its tiles are."""
    if problem.device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return f"{NAME} needs an NVIDIA GPU that PyTorch can use, got device {str(problem.device)!r}"
    major, minor = torch.cuda.get_device_capability(problem.device)
    size = BLOCK_SIZES.get(major)
    if size is None:
        return f"{NAME} takes block lists on compute capability 9.x to 11.x, got {major}.{minor}"
    if problem.block_size != size:
        return f"{NAME} needs blocks of {size} on this GPU, got {problem.block_size}; use block_size={size}"
    if problem.head_dim > MAX_HEAD_DIM or problem.head_dim % 8:
        return f"{NAME} needs a head_dim up to {MAX_HEAD_DIM} that 8 divides, got {problem.head_dim}"
    return lacking()


@cache
def lacking() -> str | None:
    """What of the package is missing, or None."""
    try:
        interface = importlib.import_module("flash_attn.cute.interface")
        sparsity = importlib.import_module("flash_attn.cute.block_sparsity")
    except ImportError as error:
        return f"{NAME} needs FlashAttention-4, install it with `pip install flash-attn-4` ({error})"
    absent = NEEDED - set(inspect.signature(interface.flash_attn_func).parameters)
    absent |= {"block_size"} - set(sparsity.BlockSparseTensorsTorch._fields)
    if absent:
        return f"{NAME} needs a newer flash-attn-4, this one does not know {', '.join(sorted(absent))}"
    return None


@dataclass(frozen=True, eq=False)
class Lists:
    """A mask as FlashAttention-4 takes it; batch and heads are 1 where all share theirs.

    Attributes:
        partial_count, full_count: key blocks of each query block, int32 (batch, heads, rows).
        partial_index, full_index: which, int32 (batch, heads, rows, the most of any row).
        tile_of: the tile of every pair of blocks, int32 (batch, heads, rows, columns).
        words: the bits of tiles, int32 (tiles, queries, keys / 32); the last two have all of them, and none.
        attending: which queries attend to anything.
    """

    partial_count: torch.Tensor
    partial_index: torch.Tensor
    full_count: torch.Tensor
    full_index: torch.Tensor
    tile_of: torch.Tensor
    words: torch.Tensor
    attending: Attending

    @classmethod
    def of(cls, mask: BlockMask) -> Lists:
        groups = torch.zeros(1, 1, dtype=torch.long, device=mask.device)
        if mask.head_groups is not None:
            groups = mask.head_groups.long().view(-1, mask.head_groups.shape[-1])
        (partial_count, partial_index), (full_count, full_index) = map(_padded, (mask.partial, mask.full))
        words = mask.tiles.view(torch.int32)
        ends = words.new_tensor([-1, 0]).view(2, 1, 1).expand(2, *words.shape[1:])
        tile_of = mask.block_tiles()
        tile_of = torch.where(tile_of == -2, len(words), tile_of)
        tile_of = torch.where(tile_of == -1, len(words) + 1, tile_of)
        return cls(
            partial_count[groups],
            partial_index[groups],
            full_count[groups],
            full_index[groups],
            tile_of[groups],
            torch.cat([words, ends]).contiguous(),
            Attending.of(mask),
        )


def _padded(lists: BlockLists) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts (G, R) and indices (G, R, the most of any row, at least 1), both int32; 0 past the count."""
    most = max(1, int(lists.count.max())) if lists.count.numel() else 1
    place = torch.arange(most, device=lists.index.device)
    listed = place < lists.count[..., None]
    index = lists.index if lists.index.numel() else lists.index.new_zeros(1)
    where = torch.where(listed, lists.start[..., None] + place, 0)
    return lists.count, torch.where(listed, index[where.long()], 0).int()


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, problem: Problem, *, scale: float, text_valid: Lengths
) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_sparse_attention` by FlashAttention-4; compiles for seconds on the first call of a kind."""
    from flash_attn.cute.block_sparsity import (  # pyright: ignore[reportMissingImports]
        BlockSparseTensorsTorch,
    )
    from flash_attn.cute.interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    own = mask.derived(Lists, lambda: Lists.of(mask))
    bits = [own.tile_of, own.words]
    if text_valid is not None:
        bits.append(mask.text[0] + text_valid)
    samples, heads = own.tile_of.shape[:2]
    shown = mask_mod(mask.block_size, samples > 1, heads > 1, None if text_valid is None else mask.text[1])
    sparse = BlockSparseTensorsTorch(
        mask_block_cnt=own.partial_count,
        mask_block_idx=own.partial_index,
        full_block_cnt=own.full_count,
        full_block_idx=own.full_index,
        block_size=mask.block_size,
    )
    out, lse = flash_attn_func(
        *(x.transpose(1, 2) for x in (q, k, v)),
        softmax_scale=scale,
        mask_mod=shown,
        aux_tensors=bits,
        block_sparse_tensors=sparse,
        return_lse=True,
    )
    attends = own.attending.rows(text_valid)
    out = torch.where(attends[..., None], out.transpose(1, 2), 0)
    return out, torch.where(attends, lse, -torch.inf)


@cache
def mask_mod(
    block_size: tuple[int, int], by_sample: bool, by_head: bool, text_stop: int | None
) -> Callable[..., Any]:
    """The function of an element of a partial block, in CuTe: whether its bit is set, and its text valid.

    Args:
        block_size: queries and keys of a block.
        by_sample, by_head: whether tiles differ by these.
        text_stop: where text ends that is padded; None: none is.
    """
    import cutlass  # pyright: ignore[reportMissingImports]
    from cutlass import cute  # pyright: ignore[reportMissingImports]
    from flash_attn.cute.utils import scalar_to_ssa  # pyright: ignore[reportMissingImports]

    (queries, keys), samples, heads = block_size, int(by_sample), int(by_head)

    @cute.jit
    def bit(batch, head, query, key, seqlen_info, aux_tensors):
        tile = aux_tensors[0][batch[0] * samples, head[0] * heads, query[0] // queries, key[0] // keys]
        word = aux_tensors[1][tile, query[0] % queries, key[0] % keys // 32]
        shown = scalar_to_ssa((word >> (key[0] % 32)) & 1, cutlass.Int32)
        return shown == scalar_to_ssa(1, cutlass.Int32)

    @cute.jit
    def bit_of_valid_text(batch, head, query, key, seqlen_info, aux_tensors):
        stop = scalar_to_ssa(aux_tensors[2][batch[0]], cutlass.Int32)
        valid = (key < stop) | (key >= scalar_to_ssa(text_stop, cutlass.Int32))
        return bit(batch, head, query, key, seqlen_info, aux_tensors) & valid

    return bit if text_stop is None else bit_of_valid_text


BACKEND = Backend(NAME, attend, dtypes=(torch.float16, torch.bfloat16), condition=condition)
