"""Token geometry: where the visual, text and anchor tokens of one sequence are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

MOST_TOKENS = 2**22  # 32 times 7680x4320 pixels; masks of more would take hours and all memory


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_grid(name: str, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    sizes = tuple(grid)
    if len(sizes) != 3 or any(not _is_count(n) or n < 1 for n in sizes):
        raise ValueError(
            f"`{name}` must be three positive integers (F, H, W) in latent tokens, got {sizes!r}"
        )
    return sizes


@dataclass(frozen=True)
class TokenLayout:
    """The geometry of one attention sequence.

    Args:
        grid: latent grid in tokens, (F, H, W); F is 1 for images. Visual tokens are row-major over (f, h, w).
        text_len: number of text tokens, 0 where the attention has none (Wan's self-attention).
        text_first: whether text stands before the visual tokens (FLUX) or after them (SD3, HunyuanVideo).
        anchor: grid of a second, low-resolution set of visual tokens right after the first (Scale-DiT), or
            None.
        offset: where the grid starts in that of the keys, (f, h, w), for queries that are a part of them: a
            chunk of frames under a KV cache.

    Raises:
        ValueError: a grid that is not three positive integers, a text length or an offset that is not of
            integers from 0, or more than `MOST_TOKENS` (4,194,304) tokens in all: a picture of 16384 x 16384
            pixels by FLUX has a quarter of that, a minute of 720p video by Wan a fifth.
    """

    grid: tuple[int, int, int]
    text_len: int = 0
    text_first: bool = False
    anchor: tuple[int, int, int] | None = None
    offset: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self):
        object.__setattr__(self, "grid", _check_grid("grid", self.grid))
        if self.anchor is not None:
            object.__setattr__(self, "anchor", _check_grid("anchor", self.anchor))
        if not _is_count(self.text_len) or self.text_len < 0:
            raise ValueError(f"`text_len` must be an integer of at least 0, got {self.text_len!r}")
        object.__setattr__(self, "offset", tuple(self.offset))
        if len(self.offset) != 3 or any(not _is_count(n) or n < 0 for n in self.offset):
            raise ValueError(f"`offset` must be three integers of at least 0, got {self.offset!r}")
        if self.seq_len > MOST_TOKENS:
            raise ValueError(
                f"`grid`, text and anchor must be at most {MOST_TOKENS} tokens, got {self.seq_len}: {self!r}"
                "; use a smaller size or fewer frames"
            )

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
    def kv_len(self) -> int:
        """All keys, pooled ones left out: the same tokens, but under a cache of keys (`ChunkLayout`)."""
        return self.seq_len

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key."""
        return self.seq_len * self.kv_len

    @property
    def call_lengths(self) -> tuple[int, int]:
        """Queries and keys that a layer is called with."""
        return self.seq_len, self.kv_len

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

    @property
    def image_slice(self) -> slice:
        """Where all tokens but text stand in the model's token order: visual, then anchor."""
        return slice(self.visual_slice.start, self.anchor_slice.stop)

    @property
    def text_last(self) -> torch.Tensor:
        """The model's token at each place, int64 (S,), with visual tokens first, then anchor, then text."""
        tokens = torch.arange(self.seq_len, device="cpu")
        return torch.cat([tokens[part] for part in (self.image_slice, self.text_slice)])

    def padding(self, text_valid: torch.Tensor) -> torch.Tensor:
        """Which tokens are padded text, bool (B, S) in the model's token order.

        Args:
            text_valid: how many text tokens of each sample are real, integers (B,).
        """
        text, position = self.text_slice, torch.arange(self.seq_len, device=text_valid.device)
        return (position >= text.start + text_valid[:, None]) & (position < text.stop)

    def tokens_in(self, keys: TokenLayout) -> torch.Tensor:
        """Which visual tokens of the keys those of this layout are: row-major indices, int64 (V,), ascending.

        Raises:
            ValueError: a grid that reaches out of that of the keys, or keys that are themselves a part.
        """
        reach = [at + n for at, n in zip(self.offset, self.grid, strict=True)]
        if any(keys.offset) and keys != self:
            raise ValueError(f"the layout of the keys must have no `offset`, got {keys.offset}")
        if keys == self:
            return torch.arange(self.visual_len, device="cpu")
        if any(n > limit for n, limit in zip(reach, keys.grid, strict=True)):
            raise ValueError(
                f"queries on grid {self.grid} at offset {self.offset} reach out of the keys' grid {keys.grid}"
            )
        axes = [torch.arange(at, stop, device="cpu") for at, stop in zip(self.offset, reach, strict=True)]
        f, h, w = torch.cartesian_prod(*axes).view(-1, 3).unbind(1)
        return (f * keys.grid[1] + h) * keys.grid[2] + w

    @cached_property
    @torch.inference_mode(False)  # what is cached must be usable under autograd
    def coordinates(self) -> torch.Tensor:
        """(f, h, w) of every visual token in row-major order: int32 of shape (visual_len, 3), on the CPU."""
        axes = [torch.arange(n, dtype=torch.int32, device="cpu") for n in self.grid]
        return torch.cartesian_prod(*axes).view(-1, 3)
