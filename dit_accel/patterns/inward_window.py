"""FreeSwim's window: it slides inward at the borders, so that every query keeps the same number of keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_accel.arguments import integers
from dit_accel.masks.layout import TokenLayout

from .base import AxisWise, whole_axis


@dataclass(frozen=True)
class InwardWindow(AxisWise):
    """Each query attends, in all frames, to the 2 d + 1 rows and columns around it; windows slide inward.

    On an axis of n tokens: keys from q - d - max(d + q - n + 1, 0) to q + d + max(d - q, 0), clipped to the
    axis, which is covered in full where 2 d + 1 >= n. Every token is in its own window.

    Args:
        half_window: (dh, dw) in tokens; FreeSwim takes the native height and width in pixels // 16 // 2.

    Raises:
        ValueError: entries that are not two integers of at least 0.

    Source: Wu et al., "FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free
    Ultra-High-Resolution Video Generation", 2025.
    """

    half_window: tuple[int, int]

    def __post_init__(self):
        object.__setattr__(self, "half_window", integers("half_window", self.half_window, "(dh, dw)", 0))

    @property
    def row_reach(self) -> int:
        return self.half_window[0]

    @property
    def band_rows(self) -> int:
        """At a border of the picture a window lies on one side of its query."""
        return self.half_window[0] + 1

    def axis_tables(self, layout: TokenLayout) -> list[torch.Tensor]:
        frames, height, width = layout.grid
        windows = [_axis_table(n, d) for n, d in zip((height, width), self.half_window, strict=True)]
        return [whole_axis(frames), *windows]


def _axis_table(n: int, d: int) -> torch.Tensor:
    q, d = torch.arange(n, device="cpu"), min(d, n)
    first = q - d - (d + q - n + 1).clamp(min=0)
    last = q + d + (d - q).clamp(min=0)
    return (q >= first[:, None]) & (q <= last[:, None])
