"""Full attention, as a pattern."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_accel.masks.layout import TokenLayout

from .base import AxisWise, whole_axis


@dataclass(frozen=True)
class Dense(AxisWise):
    """Every token attends to every token. In a recipe it keeps the model's original attention untouched."""

    sparse = False

    def axis_tables(self, layout: TokenLayout) -> list[torch.Tensor]:
        return [whole_axis(n) for n in layout.grid]
