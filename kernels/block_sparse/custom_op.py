"""Backends that `torch.compile` cannot look into, as one operator that it takes whole.

What they do depends on the mask's contents, which a graph must not be compiled for. An operator's arguments
are tensors and numbers: those of the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from dit_accel.masks.block_lists import BlockLists
from dit_accel.masks.block_mask import BlockMask

from .backends import named
from .problem import Problem

# Of the first tensor of a mask, the others and its launch data, which compiled calls share: masks of a
# geometry are used again and again, and what backends derive from one takes as long as many calls.
_launch_data = WeakTensorKeyDictionary()


def attend(
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    problem: Problem,
    *,
    scale: float,
    text_valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the backend of that name returns, with the gradients that it says."""
    return_lse = problem.return_lse or problem.requires_grad
    full, partial = mask.full, mask.partial
    out, lse = _attend(
        q, k, v,
        full.start, full.count, full.index, partial.start, partial.count, partial.index, partial.tile,
        mask.tiles, mask.head_groups, text_valid,
        *mask.block_size, *mask.text, scale, return_lse, problem.quantization, problem.tail,
        problem.pv_threshold, backend,
    )  # fmt: skip
    return out, lse if problem.return_lse else None


@torch.library.custom_op("dit_accel::block_sparse_attention_plain", mutates_args=())
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    full_start: torch.Tensor,
    full_count: torch.Tensor,
    full_index: torch.Tensor,
    partial_start: torch.Tensor,
    partial_count: torch.Tensor,
    partial_index: torch.Tensor,
    partial_tile: torch.Tensor,
    tiles: torch.Tensor,
    head_groups: torch.Tensor | None,
    text_valid: torch.Tensor | None,
    block_q: int,
    block_k: int,
    text_start: int,
    text_stop: int,
    scale: float,
    return_lse: bool,
    quantization: str | None,
    tail: str | None,
    pv_threshold: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    lists = full_start, full_count, full_index, partial_start, partial_count, partial_index, partial_tile
    mask = _mask(q, k, lists, tiles, head_groups, (block_q, block_k), (text_start, text_stop))
    asked = {"return_lse": return_lse, "quantization": quantization, "tail": tail}
    problem = Problem.of(q, k, v, mask, **asked, pv_threshold=pv_threshold)
    out, lse = named(backend).compute(q, k, v, mask, problem, scale=scale, text_valid=text_valid)
    return out.contiguous(), lse.contiguous() if return_lse else q.new_empty(0)


@_attend.register_fake
def _(q, k, v, *others):
    return_lse = others[-5]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=dtype) if return_lse else q.new_empty(0)
    return q.new_empty(q.shape), lse


def _mask(
    q: torch.Tensor,
    k: torch.Tensor,
    lists: Sequence[torch.Tensor],
    tiles: torch.Tensor,
    head_groups: torch.Tensor | None,
    block_size: tuple[int, int],
    text: tuple[int, int],
) -> BlockMask:
    mask = BlockMask(
        block_size=block_size,
        seq_len=q.shape[2],
        kv_len=k.shape[2],
        full=BlockLists(*lists[:3]),
        partial=BlockLists(*lists[3:]),
        tiles=tiles,
        text=text,
        head_groups=head_groups,
    )
    _share_launch_data(mask)
    mask.validate()
    return mask


# -- gradients -----------------------------------------------------------------------------------------------


@torch.library.custom_op("dit_accel::block_sparse_attention_backward", mutates_args=())
def _gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: list[torch.Tensor],
    tiles: torch.Tensor,
    head_groups: torch.Tensor | None,
    text_valid: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    block_q: int,
    block_k: int,
    text_start: int,
    text_stop: int,
    scale: float,
    tail: str | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = _mask(q, k, lists, tiles, head_groups, (block_q, block_k), (text_start, text_stop))
    gradients, options = named(backend).gradients, {"scale": scale, "text_valid": text_valid, "tail": tail}
    if gradients is None:
        raise RuntimeError(f"{backend} has no gradients from out and lse")
    dq, dk, dv = (x.contiguous() for x in gradients(q, k, v, mask, out, lse, dout, dlse, **options))
    return dq, dk, dv


@_gradients.register_fake
def _(q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:13], *output)
    ctx.numbers = *inputs[13:18], inputs[20], inputs[22]  # sizes, scale, tail, backend
    ctx.has_lse = inputs[18]


def _backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor | None) -> tuple:
    if not ctx.has_lse:
        raise RuntimeError("gradients need the log-sum-exp: call `block_sparse_attention`")
    q, k, v, *lists, tiles, head_groups, text_valid, out, lse = ctx.saved_tensors
    rest = (tiles, head_groups, text_valid, out, lse, dout, dlse, *ctx.numbers)
    return *_gradients(q, k, v, lists, *rest), *[None] * 20


_attend.register_autograd(_backward, setup_context=_keep)


def _share_launch_data(mask: BlockMask) -> None:
    """Go on with the launch data of an earlier mask of the same tensors, sizes and text."""
    first, *others = mask.tensors().values()
    sizes = (mask.block_size, mask.seq_len, mask.kv_len, mask.text, len(others))
    entry: Any = _launch_data.get(first, (None, (), None))
    earlier, references, launch_data = entry
    if earlier == sizes and all(ref() is x for ref, x in zip(references, others, strict=True)):
        vars(mask)["launch_data"] = launch_data
    else:
        _launch_data[first] = sizes, [TensorWeakRef(x) for x in others], mask.launch_data
