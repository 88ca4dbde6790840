"""FLUX: text before image, rotary embedding on all tokens, double-stream then single-stream blocks.

Kontext's reference image stands behind the image: it is the layout's anchor, attended densely.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dit_accel.masks.layout import TokenLayout

from .base import Family, Fill, HeadSearch, double_and_single, double_and_single_blocks
from .registry import register
from .tokens import Permute, read_once

Grid = tuple[int, int, int]


@register
class Flux(Family):
    """FLUX.1: double-stream, then single-stream blocks, text before the visual tokens."""

    name = "flux"
    transformer = "FluxTransformer2DModel"
    originals = ("FluxAttnProcessor",)
    stays_dense = "text tokens; Kontext's reference image"
    pure_noise = 1.0

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        return double_and_single(transformer)

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        return double_and_single_blocks(transformer)

    def rotary_module(self, transformer: Any) -> nn.Module:
        return transformer.pos_embed

    def rotary_axes(self, transformer: Any, args: tuple) -> list[tuple[torch.Tensor, int]]:
        return [(args[0][:, i], dim) for i, dim in enumerate(transformer.pos_embed.axes_dim)]

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        grid, reference = read_once(memo, inputs["img_ids"], grids_of_ids)
        text_len = inputs["encoder_hidden_states"].shape[1]
        return TokenLayout(grid, text_len=text_len, text_first=True, anchor=reference)

    def enter(self, transformer: Any, inputs: dict[str, Any], layout: TokenLayout, permute: Permute) -> dict:
        changed = {
            "hidden_states": _move_image(inputs["hidden_states"], 1, layout, permute),
            "img_ids": _move_image(inputs["img_ids"], -2, layout, permute),
        }
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if inputs.get(name) is not None:
                changed[name] = [_move_image(sample, 1, layout, permute) for sample in inputs[name]]
        return inputs | changed

    def leave(
        self, transformer: Any, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        return _move_image(sample, 1, layout, restore)

    # -- what is known before a run --------------------------------------------------------------------------

    upscaled_shift = 3.0  # CLEAR, arXiv 2412.16112
    head_search = HeadSearch(scale=8.0, steps=15, side=512)  # published: arXiv 2506.10978

    def patch(self, config: Any) -> Grid:
        return 1, 2, 2  # packed by the pipeline

    def planned_layout(self, grid: Grid, text_len: int) -> TokenLayout:
        return TokenLayout(grid, text_len=text_len, text_first=True)

    def example_inputs(self, config: Any, grid: Grid, text_len: int, fill: Fill) -> dict[str, torch.Tensor]:
        timestep = fill(1).fill_(0.5)
        place = (torch.arange(n, dtype=timestep.dtype, device=timestep.device) for n in grid)
        inputs = {
            "hidden_states": fill(1, grid[1] * grid[2], config.in_channels),
            "encoder_hidden_states": fill(1, text_len, config.joint_attention_dim),
            "pooled_projections": fill(1, config.pooled_projection_dim),
            "timestep": timestep,
            "img_ids": torch.cartesian_prod(*place),
            "txt_ids": fill(text_len, 3).zero_(),
        }
        return inputs | ({"guidance": fill(1).fill_(3.5)} if config.guidance_embeds else {})


def _move_image(x: torch.Tensor, dim: int, layout: TokenLayout, move: Permute) -> torch.Tensor:
    """x with the image's tokens moved and those of a reference image, which stand behind, left in place."""
    if layout.anchor is None:
        return move(x, dim)
    image, reference = x.split([layout.visual_len, layout.anchor_len], dim=dim)
    return torch.cat([move(image, dim), reference], dim=dim)


def grids_of_ids(ids: torch.Tensor) -> tuple[Grid, Grid | None]:
    """The token grids (1, H, W) of image and reference image (or None), from image ids (S, 3) or (B, S, 3).

    Raises:
        ValueError: ids that are not one or two full row-major grids.
    """
    rows = (ids[0] if ids.ndim == 3 else ids).detach().cpu()
    of_reference = (rows[:, 0] != rows[0, 0]).nonzero()
    if not len(of_reference):
        return _grid(rows), None
    start = int(of_reference[0])
    return _grid(rows[:start]), _grid(rows[start:])


def _grid(rows: torch.Tensor) -> Grid:
    """The token grid behind the ids (S, 3) of one image."""
    start_of_row = (rows[:, 1] != rows[0, 1]).nonzero()
    width = int(start_of_row[0]) if len(start_of_row) else len(rows)
    height = len(rows) // width
    # in bf16, as pipelines pass them, places from 257 on are rounded
    places = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in (height, width))).view(-1, 2)
    expected = (places + (rows[0, 1:].long() if len(rows) else 0)).to(rows.dtype)
    if (
        height * width != len(rows)
        or not torch.equal(rows[:, 1:], expected)
        or (rows[:, 0] != rows[0, 0]).any()
    ):
        raise ValueError(
            "the image ids of this FLUX call are not one full grid of tokens, nor those of one image and one "
            "reference image (Kontext), which accelerated attention does not support; "
            "`dit_accel.disable(pipe)` for such calls"
        )
    return 1, height, width
