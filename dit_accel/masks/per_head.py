"""Block masks whose heads differ, from one mask per pattern."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import torch

from .block_lists import BlockLists
from .block_mask import BlockMask


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
        if not (_same(part.order, first.order) and _same(part.key_order, first.key_order)):
            raise ValueError(
                "masks of different token orders cannot be joined; build them with one explicit `order`"
            )
    first_tiles = [sum(p.tiles.shape[0] for p in parts[:i]) for i in range(len(parts))]
    joined = replace(
        first,
        full=BlockLists.joined([part.full for part in parts], first_tiles),
        partial=BlockLists.joined([part.partial for part in parts], first_tiles),
        tiles=torch.cat([part.tiles for part in parts]),
        head_groups=torch.tensor([used.index(key) for key in heads], dtype=torch.int32, device=first.device),
    )
    return joined.trusted() if all(part.is_trusted for part in parts) else joined


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
