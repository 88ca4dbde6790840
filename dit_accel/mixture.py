"""Block masks whose heads differ, from one mask per pattern."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import torch

from .blockmask import BlockMask


def join_heads(masks: Mapping[Hashable, BlockMask], heads: Sequence[Hashable]) -> BlockMask:
    """One mask in which head h follows `masks[heads[h]]`.

    Args:
        masks: masks of one head group each, of the same sequence, block size and token order.
        heads: for each head, a key of `masks`.

    Raises:
        ValueError: masks that cannot be joined.
    """
    used = list(dict.fromkeys(heads))
    parts = [masks[key] for key in used]
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts:
        same = (part.block_size, part.seq_len, part.kv_len, part.text, part.num_groups, part.device)
        if same != (first.block_size, first.seq_len, first.kv_len, first.text, 1, first.device):
            raise ValueError(f"masks of different geometry cannot be joined: {first!r} and {part!r}")
        if (part.order is None) != (first.order is None) or (
            part.order is not None and not torch.equal(part.order, first.order)
        ):
            raise ValueError(
                "masks of different token orders cannot be joined; build them with one explicit `order`"
            )
    tiles = _offsets([part.tiles.shape[0] for part in parts])
    return replace(
        first,
        full_ptr=_pointers([part.full_ptr for part in parts]),
        full_idx=torch.cat([part.full_idx for part in parts]),
        part_ptr=_pointers([part.part_ptr for part in parts]),
        part_idx=torch.cat([part.part_idx for part in parts]),
        part_tile=torch.cat([part.part_tile + start for part, start in zip(parts, tiles, strict=True)]),
        tiles=torch.cat([part.tiles for part in parts]),
        head_groups=torch.tensor([used.index(key) for key in heads], dtype=torch.int32, device=first.device),
        cache={},
    )


def _pointers(pointers: list[torch.Tensor]) -> torch.Tensor:
    """Row pointers (1, R + 1) of lists that are concatenated: (len, R + 1)."""
    starts = _offsets([int(p[0, -1]) for p in pointers])
    return torch.cat([p + start for p, start in zip(pointers, starts, strict=True)])


def _offsets(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths))]
