"""Chunk-aware growth: the more of an autoregressive video is past, the less of it a chunk computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F

from dit_accel.arguments import integer, is_number, shown
from dit_accel.attention.block_grid import BlockGrid
from dit_accel.attention.block_scores import block_means, largest
from dit_accel.attention.online import Online
from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.chunk_layout import ChunkLayout
from dit_accel.masks.layout import TokenLayout
from dit_accel.masks.orders import raster
from dit_accel.masks.tiles import check_block_size

from .base import OnlinePattern
from .chunk_causal import ChunkCausal
from .dense import Dense

if TYPE_CHECKING:
    from dit_accel.attention.layer_masks import LayerMasks


class _Aim(float):
    """The field `density`, which answers for a layout as the method of other patterns does."""

    pattern: ChunkGrowth

    def __call__(self, layout: TokenLayout) -> float:
        return self.pattern.aimed(layout)


class _Density:
    """A field and a method of one name; instances keep the number alone."""

    def __get__(self, pattern: ChunkGrowth | None, owner: type) -> float:
        if pattern is None:
            return 0.15
        aim = _Aim(pattern.__dict__["density"])
        aim.pattern = pattern
        return aim

    def __set__(self, pattern: ChunkGrowth, value: float) -> None:
        pattern.__dict__["density"] = value


@dataclass(frozen=True)
class ChunkGrowth(OnlinePattern):
    """Chunks of frames see their own chunk in full, and of earlier ones the blocks that weigh most for them.

    Attention is chunk-causal, as in `ChunkCausal`. Of its past, chunk i computes the share
    base + b / sqrt(frames up to its end), the first chunk, which has none, everything. b is such that later
    chunks together, each weighed by what it sees, have `density`; no share is above 1, and where that cuts
    one off they have less. The choice is in two steps, anew in every call, for each sample and head: a chunk
    keeps `top_frames` past frames of the largest mean q . mean k, frame 0 and the chunk before; in these a
    block of queries takes as many blocks of keys as the share of its whole past is, by the means of blocks. A
    block that reaches into another frame or chunk is chosen with it, and what is to come stays hidden token
    by token. Blocks with text are always kept, and under a cache of keys (`ChunkLayout`), where coarse tokens
    count as others and frames to come for the budget, those with keys of zeros.

    `density` is both the field and, called with a layout, the share of all pairs that it aims at there.

    Args:
        frames_per_chunk: latent frames of a chunk; in SkyReels-V2 its `causal_block_size`, in AnyFlow-FAR
            those of every chunk but the first and the last.
        density: share of the past that the chunks after the first compute together, above 0 and at most 1.
        base: share that a chunk of an endless video computes, at most `density`.
        window: frames up to the end of its chunk that a chunk sees, others are hidden; None: all.
        top_frames: past frames that are kept by content.
        block_size: tokens of a block of queries, and of keys.

    Raises:
        ValueError: values outside these forms.

    Source: "Light Forcing: Accelerating Autoregressive Video Diffusion via Sparse Attention", 2026. Its block
    size and number of frames are not public; `top_frames` is the least of its 6 to 12.
    """

    frames_per_chunk: int = 3
    density: float = _Density()  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    base: float = 0.05
    window: int | None = None
    top_frames: int = 6
    block_size: tuple[int, int] = (128, 64)

    def __post_init__(self):
        for name in ("frames_per_chunk", "top_frames"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 1))
        density = self.__dict__["density"]
        if not is_number(density) or not 0 < density <= 1:
            raise ValueError(f"`density` must be a number above 0 and at most 1, got {shown(density)}")
        if not is_number(self.base) or not 0 <= self.base <= density:
            raise ValueError(f"`base` must be a number from 0 to `density` {density}, got {shown(self.base)}")
        for name, value in (("density", density), ("base", self.base)):
            object.__setattr__(self, name, float(value))
        if self.window is not None:
            object.__setattr__(self, "window", integer("window", self.window, self.frames_per_chunk))
        check_block_size(self.block_size)
        object.__setattr__(self, "block_size", tuple(map(int, self.block_size)))

    @property
    def hides(self) -> bool:
        """Frames to come."""
        return True

    @property
    def causal_chunks(self) -> int:
        return self.frames_per_chunk

    # -- how much --------------------------------------------------------------------------------------------

    def chunk_densities(self, chunks: int) -> list[float]:
        """The share of its past that each of so many whole chunks computes."""
        return self._densities([self.frames_per_chunk] * chunks)

    def _densities(self, chunks: Sequence[int]) -> list[float]:
        """The same of chunks of so many frames."""
        past = list(accumulate(chunks))[1:]
        seen = [min(n, self.window or n) for n in past]
        weights = [own * n for own, n in zip(chunks[1:], seen, strict=True)]
        growth = [n**-0.5 for n in past]
        budget = (float(self.density) - self.base) * sum(weights)
        b = budget / sum(a * w for a, w in zip(growth, weights, strict=True)) if past else 0.0
        return [1.0, *(min(1.0, self.base + a * b) for a in growth)][: len(chunks)]

    def aimed(self, layout: TokenLayout) -> float:
        """The share of all pairs of a layout that it aims at: chunks' own, text, and shares of the past.

        Calls compute less where the frames that they keep have fewer blocks.
        """
        blocks = _blocks(self, layout, torch.device("cpu"))
        rows, columns = blocks.past.shape
        share = torch.ones_like(blocks.seen.listed_blocks()[0], dtype=torch.float64)
        part = blocks.number / blocks.past.sum(1, keepdim=True).clamp(min=1)
        share[:rows, :columns] = torch.where(blocks.past, part, 1.0)
        return float((share * _pairs(blocks.seen)).sum()) / layout.pairs

    # -- which -----------------------------------------------------------------------------------------------

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: TokenLayout,
        *,
        block_size: tuple[int, int] | None = None,
        text_valid: torch.Tensor | None = None,
    ) -> BlockMask:
        """See `OnlinePattern.select`; with another `block_size` the choice is among such blocks."""
        own = self if block_size is None else replace(self, block_size=block_size)
        blocks = _blocks(own, layout, q.device)
        return blocks.seen.restricted(blocks.grid.every(own._chosen(blocks, q, k)))

    def _chosen(self, blocks: _Blocks, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Among the blocks of visual tokens alone, bool (B, H, R, C), what is to come included."""
        q, k = blocks.grid.enter(q), blocks.grid.enter(k)
        kept = self._kept_frames(blocks, q, k)[:, :, blocks.chunk]  # (B, H, R, F)
        candidate = blocks.past & ((kept.float() @ blocks.frames.float().mT) > 0)
        q, k = blocks.grid.visual(q, k)
        if not candidate.numel():
            return candidate
        scores = block_means(q, self.block_size[0]) @ block_means(k, self.block_size[1]).mT
        chosen = largest(scores.masked_fill(~candidate, -torch.inf), blocks.number)
        return (chosen & candidate) | ~blocks.past

    def _kept_frames(self, blocks: _Blocks, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Past frames in which each chunk chooses: bool (B, H, chunks, F); q and k visual tokens first."""
        of_chunks, keys = _means(q, blocks.chunk_tokens), _means(k, blocks.frame_tokens)
        scores = (of_chunks @ keys.mT).masked_fill(~blocks.past_frames, -torch.inf)
        return (largest(scores, self.top_frames) | blocks.kept_frames) & blocks.past_frames

    def layer(self, masks: LayerMasks) -> Online:
        return replace(Online.of(self, masks), block_size=self.block_size)


class _Blocks(NamedTuple):
    """What is known of a layout before a call; R and C are blocks of visual tokens alone.

    Attributes:
        grid: the blocks, frame by frame.
        seen: the mask of all that chunks may see.
        past: blocks that are chosen by content, bool (R, C): before all chunks that a block of queries is of.
        number: how many of them a block of queries takes, int64 (R, 1).
        chunk: the chunk of a block of queries, the last if there are two, counted from the first that has
            queries, int64 (R,).
        frames: which frames a block of keys has tokens of, bool (C, F).
        past_frames, kept_frames: of each chunk with queries, those before it, and those that it always keeps:
            bool (chunks, F).
        chunk_tokens, frame_tokens: of each chunk with queries, and of each frame.
    """

    grid: BlockGrid
    seen: BlockMask
    past: torch.Tensor
    number: torch.Tensor
    chunk: torch.Tensor
    frames: torch.Tensor
    past_frames: torch.Tensor
    kept_frames: torch.Tensor
    chunk_tokens: list[int]
    frame_tokens: list[int]


class _Call(NamedTuple):
    """Chunks of frames, and which of them a call has.

    Attributes:
        chunks: frames of each chunk of the whole video.
        present: how many of them there are.
        first: the first that has queries.
        frame_tokens: of each frame that there is.
    """

    chunks: list[int]
    present: int
    first: int
    frame_tokens: list[int]

    @classmethod
    def of(cls, pattern: ChunkGrowth, layout: TokenLayout) -> _Call:
        """Raises ValueError where a model's own chunks are not those of the pattern."""
        size, frames = pattern.frames_per_chunk, layout.grid[0]
        if not isinstance(layout, ChunkLayout):
            size, tokens = min(size, frames), layout.grid[1] * layout.grid[2]
            chunks = [min(size, frames - at) for at in range(0, frames, size)]
            return cls(chunks, len(chunks), 0, [tokens] * frames)
        longest = max(layout.chunks)
        if longest > size or any(inner != size for inner in layout.chunks[1:-1]):
            raise ValueError(
                f"this model's chunks have {', '.join(map(str, layout.chunks))} frames, got {pattern} with "
                f"{size}; use frames_per_chunk={longest}"
            )
        first = layout.present - 1 if layout.last_alone else 0
        return cls(list(layout.chunks), layout.present, first, layout.frame_tokens)

    def blocks(self, pattern: ChunkGrowth, layout: TokenLayout) -> tuple[BlockGrid, BlockMask]:
        """The blocks, frame by frame, and the mask of all that chunks may see."""
        size, order = pattern.block_size, raster(layout.grid)
        if not isinstance(layout, ChunkLayout):
            causal = ChunkCausal(pattern.frames_per_chunk, window=pattern.window)
            return BlockGrid.of(layout, size, order), causal.block_mask(layout, size, order)
        if pattern.window is not None:
            raise ValueError(f"this model's chunks see all before them; use window=None in {pattern}")
        seen = Dense().block_mask(layout, size, order)
        none = torch.zeros(seen.num_rows, seen.num_cols, dtype=torch.bool, device="cpu")
        return _VisualBlocks(layout, size, None, none), seen


class _VisualBlocks(BlockGrid):
    """Blocks of a call without text, all of which are chosen by content."""

    @cached_property
    def chosen(self) -> tuple[int, int]:
        rows, columns = self.always.shape
        return rows, columns

    def visual(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return q, k


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _blocks(pattern: ChunkGrowth, layout: TokenLayout, device: torch.device) -> _Blocks:
    call = _Call.of(pattern, layout)
    grid, seen = call.blocks(pattern, layout)
    rows, columns = grid.chosen
    lengths = torch.tensor(call.chunks[: call.present], dtype=torch.int64, device="cpu")
    end = lengths.cumsum(0)
    start, frames = end - lengths, int(end[-1])
    frame, before = torch.arange(frames, device="cpu"), F.pad(start, (1, 0))[:-1]
    past_frames = (frame < start[:, None]) & (frame >= end[:, None] - min(pattern.window or frames, frames))
    kept_frames = (frame == 0) | (frame >= before[:, None])

    tokens = torch.tensor(call.frame_tokens, dtype=torch.int64, device="cpu")
    of_token = frame.repeat_interleave(tokens)
    chunk_of = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
    queries = of_token[of_token >= start[call.first]]
    of_queries, of_keys = (
        _frames_of(own, n, size)
        for own, n, size in zip((queries, of_token), (rows, columns), pattern.block_size, strict=True)
    )
    chunk = chunk_of[of_queries[1]]
    past = of_keys[1] < start[chunk_of[of_queries[0]]][:, None]
    past = past & seen.listed_blocks()[0, :rows, :columns]
    densities = torch.tensor(pattern._densities(call.chunks), dtype=torch.float64, device="cpu")
    number = (densities[chunk] * past.sum(1)).round().long()[:, None]
    touched = (frame >= of_keys[0][:, None]) & (frame <= of_keys[1][:, None])
    kept = past_frames[call.first :], kept_frames[call.first :]
    made: list[Any] = [grid, seen, past, number, chunk - call.first, touched, *kept]
    chunk_tokens = [int(part.sum()) for part in tokens.split(lengths.tolist())][call.first :]
    return _Blocks(*(one.to(device) for one in made), chunk_tokens, call.frame_tokens)


def _frames_of(frames: torch.Tensor, blocks: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tokens in these frames, the first and the last frame of each block, int64 (blocks,)."""
    first, last = torch.arange(blocks, device="cpu") * size, len(frames) - 1
    return frames[first.clamp(max=last)], frames[(first + size - 1).clamp(max=last)]


def _means(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The mean of each stretch of so many tokens of x (B, H, S, D): (B, H, len(sizes), D)."""
    runs = [(size, len(list(same)) * size) for size, same in groupby(sizes)]
    parts = x[:, :, : sum(sizes)].split([tokens for _, tokens in runs], 2)
    return torch.cat([block_means(part, size) for part, (size, _) in zip(parts, runs, strict=True)], 2)


def _pairs(mask: BlockMask) -> torch.Tensor:
    """Attended pairs in each block of a mask of one group, float64 (R, num_cols)."""
    tiles = mask.block_tiles()[0].long()
    bits = mask.unpacked_tiles().flatten(1).sum(1, dtype=torch.float64)
    queries = torch.full((mask.num_rows, 1), mask.block_size[0], dtype=torch.float64, device=tiles.device)
    queries[-1] -= mask.num_rows * mask.block_size[0] - mask.seq_len
    full = (queries * mask.block_size[1]).expand(tiles.shape)
    return torch.cat([bits, bits.new_zeros(1)])[tiles.clamp(min=-1)].where(tiles != -2, full)
