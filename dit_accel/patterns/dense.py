"""Full attention, as a pattern."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layout import TokenLayout
from .base import AxisWise


@dataclass(frozen=True)
class Dense(AxisWise):
    """Every token attends to every token. In a recipe it keeps the model's original attention untouched."""

    def axis_tables(self, layout: TokenLayout) -> list[torch.Tensor]:
        return [torch.ones(n, n, dtype=torch.bool) for n in layout.grid]
