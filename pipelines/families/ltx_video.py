"""LTX-Video: self-attention (`attn1`) over video tokens alone, cross-attention to text (`attn2`) untouched.

Tokens enter as packed latents. Those of conditions (images, clips) that the condition pipeline puts in front
of the video are attended densely: they stand where other families have text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dit_accel.masks.layout import TokenLayout

from .base import Family, Fill
from .registry import register
from .splits import split_outputs, split_tokens
from .tokens import Permute, move_part, read_once

Grid = tuple[int, int, int]


@register
class LTXVideo(Family):
    """Packed tokens, the grid said by the pipeline or by the tokens' coordinates."""

    name = "ltx-video"
    transformer = "LTXVideoTransformer3DModel"
    originals = ("LTXVideoAttnProcessor",)
    stays_dense = "cross-attention to text; tokens of conditions beside the video"
    text_name = "condition"
    parallel_refusal = None
    split_together = True

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        return {f"blocks.{i}": block.attn1 for i, block in enumerate(transformer.transformer_blocks)}

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        return (transformer.transformer_blocks,)

    def text_layers(self, transformer: Any) -> dict[str, nn.Module]:
        return {f"blocks.{i}.attn2": block.attn2 for i, block in enumerate(transformer.transformer_blocks)}

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        coords, tokens = inputs.get("video_coords"), inputs["hidden_states"].shape[1]
        if coords is not None:
            grid, conditions = read_once(memo, coords, grid_of_coordinates)
        else:
            grid, conditions = tuple(inputs[name] for name in ("num_frames", "height", "width")), 0
        layout = TokenLayout(grid, text_len=conditions, text_first=conditions > 0)
        if layout.seq_len != tokens:
            raise ValueError(
                f"this {self.name} call has {tokens} tokens, but its frames, rows and columns are {grid}; "
                "`dit_accel.disable(pipe)` for such calls"
            )
        return layout

    def enter(self, transformer: Any, inputs: dict[str, Any], layout: TokenLayout, permute: Permute) -> dict:
        names = ["hidden_states"] + ["timestep"] * (inputs["timestep"].ndim == 2)  # of one per token
        return inputs | {name: move_part(inputs[name], 1, layout.visual_slice, permute) for name in names}

    def leave(
        self, transformer: Any, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        return move_part(sample, 1, layout.visual_slice, restore)

    def parallel_plan(self, transformer: Any) -> dict[str, Any]:
        """diffusers' splits text as well, whose mask then no longer fits the heads."""
        return split_tokens(("hidden_states", 3), ("timestep", 2)) | split_outputs({"rope": {0: 1, 1: 1}})

    def placed_outputs(self, transformer: Any) -> dict[nn.Module, int | tuple[int, int]]:
        return {transformer.rope: 1}

    # -- what is known before a run --------------------------------------------------------------------------

    video = True
    batches_guidance = True
    highres_refusal = "its positions beyond native size are not described"

    def planned_layout(self, grid: Grid, text_len: int) -> TokenLayout:
        return TokenLayout(grid)  # text is no part of its self-attention

    def example_inputs(self, config: Any, grid: Grid, text_len: int, fill: Fill) -> dict[str, Any]:
        frames, rows, columns = grid
        return {
            "hidden_states": fill(1, frames * rows * columns, config.in_channels),
            "encoder_hidden_states": fill(1, text_len, config.caption_channels),
            "encoder_attention_mask": fill(1, text_len).fill_(1),
            "timestep": fill(1).fill_(500),
            "num_frames": frames,
            "height": rows,
            "width": columns,
            "rope_interpolation_scale": (8 / 25, 32, 32),
        }

    def vae_factors(self, config: Any) -> tuple[int, int]:
        """Either said, or from its downsampling blocks and its patches."""
        halvings = 2 ** sum(config.get("spatio_temporal_scaling", (True, True, True, False)))
        frames = config.get("temporal_compression_ratio") or config.get("patch_size_t", 1) * halvings
        return frames, config.get("spatial_compression_ratio") or config.get("patch_size", 4) * halvings

    def prompt_tokens(self, folder: Any, longest: int | None) -> int:
        return longest or 128


def grid_of_coordinates(coords: torch.Tensor) -> tuple[Grid, int]:
    """The token grid of a video, and how many tokens of conditions stand before it.

    Args:
        coords: time, row and column (B, 3, S) of every token, or of where it begins and ends (B, 3, S, 2).

    Raises:
        ValueError: tokens that end in no full row-major grid.
    """
    starts = coords[0] if coords.ndim == 3 else coords[0, ..., 0]
    time, places = starts[0].detach().cpu(), starts[1:].detach().cpu()
    area = _trailing(time == time[-1])
    width = _trailing(places[0, -area:] == places[0, -1])
    frame, whole = places[:, -area:], len(time) // area * area
    frames = places[:, -whole:].unflatten(1, (-1, area))
    times = time[-whole:].view(-1, area)
    # backwards through the video, whose first frame is the earliest; conditions before it are of later ones
    alike = (frames == frame[:, None]).all(0).all(1) & (times == times[:, :1]).all(1)
    earlier = torch.cat([times[:-1, 0] < times[1:, 0], torch.tensor([True], dtype=torch.bool, device="cpu")])
    count = _trailing(alike & earlier)
    rows = frame.unflatten(1, (-1, width)) if area % width == 0 else None
    conditions = len(time) - count * area
    if (
        rows is None
        or (rows[0] != rows[0, :, :1]).any()
        or (rows[1] != rows[1, :1]).any()
        or (time[:conditions] <= times[-count, 0]).any()
    ):
        raise ValueError(
            "the coordinates of this call do not end in one full grid of tokens, which accelerated attention "
            "does not support; `dit_accel.disable(pipe)` for such calls"
        )
    return (count, area // width, width), conditions


def _trailing(true: torch.Tensor) -> int:
    """How many of the last elements (n,) are true without a gap."""
    return int(true.flip(0).long().cumprod(0).sum())
