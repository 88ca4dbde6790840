"""Sliding tile attention: a window that moves tile by tile, so that every block is whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_accel.arguments import integers
from dit_accel.masks.layout import TokenLayout

from .base import AxisWise, Grid, whole_axis


@dataclass(frozen=True)
class SlidingTile(AxisWise):
    """Queries of a tile attend to the tiles around it; the window slides inward at the borders.

    Per axis of n tiles: c = clamp(q, k // 2, n - 1 - k // 2), keys in the tiles with |c - tile| <= k // 2 (an
    even k covers k + 1 tiles). Any canvas: the last tile of an axis may be cut, and an axis the window covers
    is full. Every token attends to its own tile.

    Args:
        window: (t, h, w) in tiles.
        tile: (t, h, w) in tokens; the paper uses (6, 8, 8).

    Raises:
        ValueError: entries that are not three positive integers.

    Source: Zhang et al., "Fast Video Generation with Sliding Tile Attention", 2025.
    """

    window: Grid
    tile: Grid = (6, 8, 8)

    def __post_init__(self):
        for name in ("window", "tile"):
            object.__setattr__(self, name, integers(name, getattr(self, name), "(t, h, w)", 1))

    def axis_tables(self, layout: TokenLayout) -> list[torch.Tensor]:
        tables = []
        for length, tile, window in zip(layout.grid, self.tile, self.window, strict=True):
            count, half = -(-length // tile), window // 2
            of_token = torch.arange(length, device="cpu") // min(tile, length)
            if 2 * half + 1 >= count:
                tables.append(whole_axis(length))
                continue
            centre = of_token.clamp(half, count - 1 - half)
            tables.append((centre[:, None] - of_token[None]).abs() <= half)
        return tables

    def natural_tiles(self, layout: TokenLayout) -> list[Grid]:
        return [self.tile]
