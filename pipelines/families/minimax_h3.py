"""MiniMax H3: one packed sequence of text, given pictures and sounds, the video's sound, and the video last.

All that is packed before the video stands where other families have text, and is attended densely. Which rows
are the video's is read from their positions: the last ones that are a full grid of frames, rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from dit_accel.masks.layout import TokenLayout

from .base import Family, Fill
from .registry import register
from .tokens import Grid, Permute, move_part, read_once

_FPS, _SOUNDS_PER_SECOND, _CHANNELS = 24, 40, 2  # numbers that stand in diffusers
_CLIP, _CLIP_LATENTS = 17, 5  # frames that its autoencoder takes at once, and their latents
_BESIDE, _BESIDE_LATENTS = 5, 2  # the same of what a video has beside whole ones


@register
class MiniMaxH3(Family):
    """Single-stream blocks over rows of all kinds, which one layout, shared by all samples, describes."""

    name = "minimax-h3"
    transformer = "MiniMaxH3Transformer3DModel"
    originals = ("MiniMaxH3AttnProcessor",)
    stays_dense = "tokens of text, of sound, and of given pictures, videos and sounds; the text's own refiner"
    text_name = "text, sound and given"
    parallel_refusal = (
        "diffusers' plan splits one packed sequence, and fails where processes do not divide its length"
    )
    shared_inputs = (
        "timestep", "timestep_indices", "token_tags", "position_ids", "video_indices", "audio_indices",
        "text_indices",
    )  # fmt: skip
    pure_noise, clean = 0.0, 1.0
    distillation_refusal = "they denoise sound beside the video"

    def timestep(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The video's, of those of all rows."""
        return inputs["timestep"].index_select(0, inputs["timestep_indices"][-1:])

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        return {f"blocks.{i}": block.attn for i, block in enumerate(transformer.transformer_blocks)}

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        return (transformer.transformer_blocks,)

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        positions = inputs["position_ids"]
        grid = read_once(memo, positions, partial(_grid, video=inputs["video_indices"]))
        return _layout(grid, len(positions) - math.prod(grid))

    def enter(self, transformer: Any, inputs: dict[str, Any], layout: TokenLayout, permute: Permute) -> dict:
        rows = {name: inputs[name] for name in ("position_ids", "timestep_indices", "token_tags")}
        moved = {name: move_part(x, 0, layout.visual_slice, permute) for name, x in rows.items()}
        return inputs | moved | {"hidden_states": _last(inputs["hidden_states"], layout, permute)}

    def leave(
        self, transformer: Any, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        return _last(sample, layout, restore)

    # -- what is known before a run --------------------------------------------------------------------------

    video = True
    whole_latents = (_BESIDE, _BESIDE_LATENTS, _CLIP_LATENTS)
    highres_refusal = "its positions beyond native size are not described"

    def patch(self, config: Any) -> Grid:
        return tuple(config.patch_size)

    def planned_layout(self, grid: Grid, text_len: int) -> TokenLayout:
        """With the video's sound, as long as it."""
        return _layout(grid, text_len + _sounds(grid[0]))

    def example_inputs(self, config: Any, grid: Grid, text_len: int, fill: Fill) -> dict[str, Any]:
        """Of a video without given pictures; its positions are one apart, which the model's are not."""
        sounds, rows = _sounds(grid[0]), math.prod(grid)
        timestep = fill(1).fill_(0.5)
        device, first = timestep.device, text_len + sounds
        place = torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid)).view(rows, 3)
        before = torch.zeros(first, 3, device=device, dtype=place.dtype)
        every = torch.arange(first + rows, device=device)
        kinds = {"text_indices": every[:text_len], "audio_indices": every[text_len:first]}
        tags = torch.zeros_like(every)
        tags[:text_len], tags[text_len:first] = 1, 2
        return kinds | {
            "hidden_states": fill(1, rows, config.in_channels * math.prod(config.patch_size)),
            "audio_hidden_states": fill(1, sounds, config.audio_in_channels),
            "encoder_hidden_states": fill(1, text_len, config.text_dim),
            "timestep": timestep,
            "timestep_indices": torch.zeros_like(every),
            "token_tags": tags,
            "position_ids": torch.cat([before, place]),
            "video_indices": every[first:],
        }

    def vae_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return _CLIP, 16


def _layout(grid: Grid, before: int) -> TokenLayout:
    return TokenLayout(grid, text_len=before, text_first=before > 0)


def _last(x: torch.Tensor, layout: TokenLayout, move: Permute) -> torch.Tensor:
    """x (B, N, C) of all rows of pictures with those of the video, the last ones, moved."""
    return move_part(x, 1, slice(x.shape[1] - layout.visual_len, x.shape[1]), move)


def _sounds(frames: int) -> int:
    """Rows of the sound of a video of so many latent frames, of both channels."""
    seconds = ((frames - _BESIDE_LATENTS) / _CLIP_LATENTS * _CLIP + _BESIDE) / _FPS
    return max(round(seconds * _SOUNDS_PER_SECOND), 0) * _CHANNELS


def _grid(positions: torch.Tensor, video: torch.Tensor) -> Grid:
    """The token grid of the video, the last rows of a packed sequence.

    Args:
        positions: (S, 3), of each row: time, row and column of the picture.
        video: int64 (N,), the places of rows of pictures, ascending.

    Raises:
        ValueError: rows of pictures at the end that are not one full row-major grid.
    """
    rows, places = positions.detach().cpu(), video.detach().cpu()
    run = (places.flip(0) == len(rows) - 1 - torch.arange(len(places), device="cpu")).int().cumprod(0).sum()
    rows = rows[len(rows) - int(run) :]
    area = _run_of_equals(rows[:, 0])
    width = _run_of_equals(rows[:area, 1])
    if not len(rows) or len(rows) % area or area % width or not _is_grid(rows, area, width):
        raise ValueError(
            "the rows of pictures at the end of this MiniMax H3 call are not one full grid of frames, rows "
            "and columns, such as those of a video behind the rows of its sound; `dit_accel.disable(pipe)` "
            "for such calls"
        )
    return len(rows) // area, area // width, width


def _run_of_equals(values: torch.Tensor) -> int:
    """How many values at the start are the same."""
    others = (values != values[:1]).nonzero()
    return int(others[0]) if len(others) else max(len(values), 1)


def _is_grid(rows: torch.Tensor, area: int, width: int) -> bool:
    """Whether positions (S, 3) are those of a grid: times, rows and columns, each rising."""
    grid = rows.view(-1, area // width, width, 3)
    time, row, column = grid[:, :1, :1, 0], grid[:1, :, :1, 1], grid[:1, :1, :, 2]
    whole = torch.stack([x.expand(grid.shape[:3]) for x in (time, row, column)], -1)
    rising = all(bool((x.flatten().diff() > 0).all()) for x in (time, row, column))
    return rising and torch.equal(grid, whole)
