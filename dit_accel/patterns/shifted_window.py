"""Windows that partition the grid, shifted from step to step: Swin's, and HiDiffusion's MSW-MSA."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layout import TokenLayout
from .base import AxisWise


@dataclass(frozen=True)
class ShiftedWindow(AxisWise):
    """Tokens attend inside their own window, in all frames.

    Each axis of n tokens is cut into `windows` windows of ceil(n / windows) after a cyclic shift of the
    tokens by -`shift`, without a mask at the wrap. Where the count does not divide the axis the last window
    is shorter.

    Args:
        windows: number of windows (rows, columns); HiDiffusion uses (2, 2).
        shift: cyclic shift in tokens (rows, columns); HiDiffusion draws k * (window // 4), k in 0 .. 3, per
            step.

    Raises:
        ValueError: windows that are not two positive integers, or shifts that are not two integers.

    Source: Zhang et al., "HiDiffusion: Unlocking Higher-Resolution Creativity and Efficiency in Pretrained
    Diffusion Models", 2024; Liu et al., "Swin Transformer", 2021.
    """

    windows: tuple[int, int] = (2, 2)
    shift: tuple[int, int] = (0, 0)

    def __post_init__(self):
        for name, least in (("windows", 1), ("shift", None)):
            value = tuple(getattr(self, name))
            if len(value) != 2 or any(type(n) is not int or (least is not None and n < least) for n in value):
                kind = "positive integers" if least else "integers"
                raise ValueError(f"`{name}` must be two {kind} (rows, columns), got {getattr(self, name)!r}")
            object.__setattr__(self, name, value)

    def axis_tables(self, layout: TokenLayout) -> list[torch.Tensor]:
        tables = [torch.ones(layout.grid[0], layout.grid[0], dtype=torch.bool)]
        for n, windows, shift in zip(layout.grid[1:], self.windows, self.shift, strict=True):
            window = (torch.arange(n) - shift) % n // -(-n // windows)
            tables.append(window[:, None] == window)
        return tables
