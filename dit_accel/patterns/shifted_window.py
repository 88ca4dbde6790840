"""Windows that partition the grid, shifted from step to step: Swin's, and HiDiffusion's MSW-MSA."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dit_accel.arguments import integer, integers, is_integer, shown
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.pair_rules import Factor, FactorRule, Rule

from .base import AxisWise, Pattern

QUARTERS = 4


@dataclass(frozen=True)
class ShiftedWindow(AxisWise):
    """Tokens attend inside their own window, in all frames; windows move from step to step.

    Each axis of n tokens is cut into `windows` windows of w = ceil(n / windows) after a cyclic shift of the
    tokens by -shift, without a mask at the wrap. Where the count does not divide the axis the last window is
    shorter. Outside a run, as in `token_mask`, `shift="step"` is that of step 0.

    Args:
        windows: number of windows (rows, columns); HiDiffusion uses (2, 2).
        shift: `"step"` draws k in 0 .. 3 at every sampler step, as HiDiffusion does; an integer k shifts both
            axes by k * (w // 4) tokens; a pair is the shift in tokens (rows, columns).
        seed: of the draws of `"step"`, which depend on it and on the number of the step alone.

    Raises:
        ValueError: windows that are not two positive integers, a shift in none of these forms, or a seed that
            is not an integer.

    Source: Zhang et al., "HiDiffusion: Unlocking Higher-Resolution Creativity and Efficiency in Pretrained
    Diffusion Models", 2024; Liu et al., "Swin Transformer", 2021.
    """

    windows: tuple[int, int] = (2, 2)
    shift: str | int | tuple[int, int] = "step"
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "windows", integers("windows", self.windows, "(rows, columns)", 1))
        if isinstance(self.shift, (tuple, list)):
            object.__setattr__(self, "shift", integers("shift", self.shift, "(rows, columns)"))
        elif is_integer(self.shift):
            object.__setattr__(self, "shift", int(self.shift))
        elif self.shift != "step":
            raise ValueError(
                "`shift` must be 'step', a number of quarters of a window or two integers (rows, columns), "
                f"got {shown(self.shift)}"
            )
        object.__setattr__(self, "seed", integer("seed", self.seed))

    def at_step(self, step: int, sigma: float | None = None, total: int | None = None) -> Pattern:
        if self.shift != "step":
            return self
        return self.variants[random.Random(f"{self.seed}, {step}").randrange(QUARTERS)]

    @property
    def variants(self) -> Sequence[Pattern]:
        if self.shift != "step":
            return (self,)
        return [replace(self, shift=quarters, seed=0) for quarters in range(QUARTERS)]

    def axis_tables(self, layout: TokenLayout) -> list[torch.Tensor]:
        frames = torch.zeros(layout.grid[0], dtype=torch.int64, device="cpu")
        return [ids[:, None] == ids for ids in (frames, *self._window_ids(layout))]

    def rule(self, layout: TokenLayout) -> Rule:
        """By windows, not by places, so that blocks of a window that wraps around are seen to be whole."""
        labels = layout.coordinates.long().unbind(1)[1:]
        ids = [of_axis[label] for of_axis, label in zip(self._window_ids(layout), labels, strict=True)]
        counts = [int(one.max()) + 1 for one in ids]  # as many windows as hold tokens
        same = [torch.eye(n, dtype=torch.bool, device="cpu") for n in counts]
        return FactorRule([Factor(*pair) for pair in zip(ids, same, strict=True)])

    def natural_orders(self, layout: TokenLayout) -> list[torch.Tensor]:
        """Cells of tokens that share their window at every step, one after the other."""
        of_axes = zip(*(variant._window_ids(layout) for variant in self.variants), strict=True)
        rows, columns = (torch.stack(ids).unique(dim=1, return_inverse=True)[1] for ids in of_axes)
        cells = (rows[:, None] * layout.grid[2] + columns).expand(layout.grid)
        return [torch.argsort(cells.flatten(), stable=True)]

    def _window_ids(self, layout: TokenLayout) -> list[torch.Tensor]:
        """The window of each row and each column: int64 (H,), (W,)."""
        shift, ids = self.at_step(0).shift, []
        for axis, (n, windows) in enumerate(zip(layout.grid[1:], self.windows, strict=True)):
            size = -(-n // windows)
            moved = shift * (size // QUARTERS) if isinstance(shift, int) else shift[axis]
            ids.append((torch.arange(n, device="cpu") - moved % n) % n // size)
        return ids
