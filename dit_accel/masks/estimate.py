"""Block density of a mask from a sample of its query blocks, for sizes at which masks take long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .builder import on_the_cpu
from .layout import TokenLayout
from .tiles import check_block_size

if TYPE_CHECKING:
    from dit_accel.patterns.base import StaticPattern

SAMPLED = 256  # query blocks
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class MaskEstimate:
    """What is known of a mask that was not built.

    Attributes:
        order: of the visual tokens, int64 (V,).
        density: of the pattern, exact.
        block_density: computed blocks / all blocks, from `sampled` of `rows` query blocks.
    """

    order: torch.Tensor
    density: float
    block_density: float
    sampled: int
    rows: int


def estimate_mask(
    pattern: StaticPattern,
    layout: TokenLayout,
    block_size: tuple[int, int],
    order: str | Sequence[int] | torch.Tensor = "auto",
    sampled: int = SAMPLED,
) -> MaskEstimate:
    """What `pattern.block_mask(layout, block_size, order)` would be, with text last, without building it.

    Of the query blocks of visual tokens alone, one is drawn from each of `sampled` stretches of the sequence
    (all, where there are no more), and its key blocks are counted exactly; so are those of all other query
    blocks.

    Raises:
        ValueError: as `pattern.block_mask`, or a pattern with pooled keys.
    """
    if pattern.pooled_keys(layout):
        raise ValueError(f"{pattern} has pooled keys, which estimates do not count; build its mask")
    check_block_size(block_size)
    with on_the_cpu():
        order = pattern.token_order(layout, block_size, order)
        return _estimated(pattern, layout, block_size, order, sampled)


def _estimated(
    pattern: StaticPattern,
    layout: TokenLayout,
    block_size: tuple[int, int],
    order: torch.Tensor,
    sampled: int,
) -> MaskEstimate:
    rule = pattern.rule(layout)
    rows, columns = (-(-layout.seq_len // size) for size in block_size)
    visual_rows, visual_columns = (layout.visual_len // size for size in block_size)
    if layout.visual_len == layout.seq_len:  # else every query attends to something in the other key blocks
        visual_columns = columns
    # queries from here on attend to everything
    seeing = layout.visual_len + (0 if pattern.anchor_sees_visual else layout.anchor_len)

    def side(size: int, blocks: torch.Tensor):
        position = blocks[:, None] * size + torch.arange(size, device="cpu")
        return rule.side(order[position.clamp(max=layout.visual_len - 1)])

    keys = side(block_size[1], torch.arange(visual_columns, device="cpu"))

    def computed(blocks: torch.Tensor) -> int:
        """Key blocks that these query blocks compute, all together."""
        all_of_them = ((blocks + 1) * block_size[0]).clamp(max=layout.seq_len) > seeing
        some = blocks[~all_of_them & (blocks * block_size[0] < layout.visual_len)]
        count = int(all_of_them.sum()) * visual_columns + len(blocks) * (columns - visual_columns)
        for part in some.split(_ROWS_AT_ONCE) if len(some) and visual_columns else ():
            queries = side(block_size[0], part)
            maybe, sure = rule.classify(queries, keys, slice(None))
            partial = (maybe & ~sure).nonzero()
            count += int((maybe & sure).sum())
            count += int(rule.attends(queries, keys, *partial.unbind(1)).sum()) if len(partial) else 0
        return count

    drawn = _one_of_each_stretch(visual_rows, sampled)
    of_visual = computed(drawn) * visual_rows / len(drawn) if visual_rows else 0.0
    total = of_visual + computed(torch.arange(visual_rows, rows, device="cpu"))
    counted = len(drawn) + rows - visual_rows
    return MaskEstimate(order, pattern.density(layout), total / (rows * columns), counted, rows)


def _one_of_each_stretch(count: int, stretches: int) -> torch.Tensor:
    """One index of each of equally long stretches of range(count), int64; all where there are no more.

    Drawn, for evenly spaced ones may all fall on the same place of a periodic order; the same in every call.
    """
    if count <= stretches:
        return torch.arange(count, device="cpu")
    edges = torch.linspace(0, count, stretches + 1, dtype=torch.float64, device="cpu").long()
    generator = torch.Generator(device="cpu").manual_seed(0)
    places = torch.rand(stretches, dtype=torch.float64, device="cpu", generator=generator)
    return edges[:-1] + (places * (edges[1:] - edges[:-1])).long()
