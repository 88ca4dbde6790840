"""Scale-DiT: local windows in the high-resolution grid, the whole picture through a low-resolution anchor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_accel.arguments import per_axis, shown, switch
from dit_accel.masks.layout import TokenLayout

from .base import AxisWise, whole_axis


@dataclass(frozen=True)
class LocalGlobal(AxisWise):
    """Visual tokens attend to their own window in all frames, to the whole anchor and to all text.

    The anchor is a low-resolution copy of the scene in the sequence, `TokenLayout(grid, anchor=...)`, in
    Scale-DiT with 4 times fewer rows and columns. Anchor tokens attend to the anchor and to text; text
    attends to everything. A layout without an anchor (as of today's model families) leaves windows and text.

    The windows of an axis are floor(((i + offset) mod n) / window) for positions i of n, the last one being
    shorter where the window does not divide n; the one at the start wraps around. With `sliding`, a token
    attends instead to positions at most floor(window / 2) away, fewer at the borders.

    Args:
        window: tokens of a window (rows, columns), or one number for both.
        offset: by how much the windows' grid is moved (rows, columns); without meaning when `sliding`.
        sliding: whether every token has a window of its own.

    Raises:
        ValueError: windows that are not positive integers, offsets that are not integers, or `sliding`
            that is not True or False.

    Source: Zhang and Tai, "Scale-DiT: Ultra-High-Resolution Image Generation with Hierarchical Local
    Attention", 2025, and its released code (offset 1).
    """

    window: int | tuple[int, int] = (16, 16)
    offset: int | tuple[int, int] = (1, 1)
    sliding: bool = False

    anchor_sees_visual = False

    @property
    def hides(self) -> bool:
        """The anchor must not see the visual tokens."""
        return True

    def __post_init__(self):
        for name in ("window", "offset"):
            object.__setattr__(self, name, per_axis(name, getattr(self, name), 2))
        if min(self.window) < 1:
            raise ValueError(f"`window` must be positive, got {shown(self.window)}")
        switch("sliding", self.sliding)

    def axis_tables(self, layout: TokenLayout) -> list[torch.Tensor]:
        tables = [whole_axis(layout.grid[0])]
        for n, window, index in zip(layout.grid[1:], self.window, self._windows(layout), strict=True):
            place = torch.arange(n, device="cpu")
            near = (place[:, None] - place).abs() <= min(window // 2, n)
            tables.append(near if self.sliding else index[:, None] == index)
        return tables

    def _windows(self, layout: TokenLayout) -> list[torch.Tensor]:
        """The window of every row and of every column, int64 (H,) and (W,)."""
        axes = zip(layout.grid[1:], self.window, self.offset, strict=True)
        return [
            (torch.arange(n, device="cpu") + offset % n) % n // min(window, n) for n, window, offset in axes
        ]

    def natural_orders(self, layout: TokenLayout) -> list[torch.Tensor]:
        """Window by window, so that blocks are whole; cut windows come last and misalign no other."""
        if self.sliding:
            return []
        rows, columns = self._windows(layout)
        window = (rows[:, None] * (int(columns.max()) + 1) + columns).expand(layout.grid).flatten()
        size = torch.bincount(window)[window]
        return [torch.argsort((size < size.max()) * (window.max() + 1) + window, stable=True)]
