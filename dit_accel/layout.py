"""Token geometry: where the visual, text and anchor tokens of one sequence are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch


def _check_grid(name: str, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    grid = tuple(grid)
    if len(grid) != 3 or any(not isinstance(n, int) or n < 1 for n in grid):
        raise ValueError(f"`{name}` must be three positive integers (F, H, W) in latent tokens, got {grid!r}")
    return grid


@dataclass(frozen=True)
class TokenLayout:
    """The geometry of one attention sequence.

    Args:
        grid: latent grid in tokens, (F, H, W); F is 1 for images. Visual tokens are row-major over (f, h, w).
        text_len: number of text tokens, 0 where the attention has none (Wan's self-attention).
        text_first: whether text stands before the visual tokens (FLUX) or after them (SD3, HunyuanVideo).
        anchor: grid of a second, low-resolution set of visual tokens right after the first (Scale-DiT), or
            None.

    Raises:
        ValueError: a grid that is not three positive integers, or a negative text length.
    """

    grid: tuple[int, int, int]
    text_len: int = 0
    text_first: bool = False
    anchor: tuple[int, int, int] | None = None

    def __post_init__(self):
        object.__setattr__(self, "grid", _check_grid("grid", self.grid))
        if self.anchor is not None:
            object.__setattr__(self, "anchor", _check_grid("anchor", self.anchor))
        if not isinstance(self.text_len, int) or self.text_len < 0:
            raise ValueError(f"`text_len` must be an integer of at least 0, got {self.text_len!r}")

    @property
    def visual_len(self) -> int:
        """Number of tokens of the main grid, F * H * W."""
        return math.prod(self.grid)

    @property
    def anchor_len(self) -> int:
        return math.prod(self.anchor) if self.anchor else 0

    @property
    def seq_len(self) -> int:
        """All tokens: visual, anchor and text."""
        return self.visual_len + self.anchor_len + self.text_len

    @property
    def visual_slice(self) -> slice:
        """Where the main grid stands in the model's token order."""
        start = self.text_len if self.text_first else 0
        return slice(start, start + self.visual_len)

    @property
    def anchor_slice(self) -> slice:
        start = self.visual_slice.stop
        return slice(start, start + self.anchor_len)

    @property
    def text_slice(self) -> slice:
        """Where the text stands in the model's token order."""
        start = 0 if self.text_first else self.visual_len + self.anchor_len
        return slice(start, start + self.text_len)

    def padding(self, text_valid: torch.Tensor) -> torch.Tensor:
        """Which tokens are padded text, bool (B, S), where text stands last.

        Args:
            text_valid: how many text tokens of each sample are real, integers (B,).
        """
        position = torch.arange(self.seq_len, device=text_valid.device)
        return position >= self.seq_len - self.text_len + text_valid[:, None]

    @cached_property
    def coordinates(self) -> torch.Tensor:
        """(f, h, w) of every visual token in row-major order: int32 of shape (visual_len, 3), on the CPU."""
        axes = [torch.arange(n, dtype=torch.int32) for n in self.grid]
        return torch.cartesian_prod(*axes).view(-1, 3)
