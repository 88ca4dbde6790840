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
from .tokens import Grid, Permute, move_image, read_once


@register
class Flux(Family):
    """FLUX.1: double-stream, then single-stream blocks, text before the visual tokens."""

    name = "flux"
    transformer = "FluxTransformer2DModel"
    originals = ("FluxAttnProcessor",)
    stays_dense = "text tokens; Kontext's reference image"
    shared_inputs = ("img_ids", "txt_ids")
    text_places = ("txt_ids",)
    encodes = True
    pure_noise = 1.0
    parallel_refusal = None
    band_dim = 1

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
            "hidden_states": move_image(inputs["hidden_states"], 1, layout, permute),
            "img_ids": move_image(inputs["img_ids"], -2, layout, permute),
        }
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if inputs.get(name) is not None:
                changed[name] = [move_image(sample, 1, layout, permute) for sample in inputs[name]]
        return inputs | changed

    def leave(
        self, transformer: Any, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        return move_image(sample, 1, layout, restore)

    def band(self, inputs: dict[str, Any], layout: TokenLayout, rows: range) -> dict[str, Any]:
        width, frames = layout.grid[2], layout.grid[0]
        if frames > 1 or layout.anchor is not None:
            raise ValueError("bands are of one picture; use one process for calls with a reference image")
        own = slice(rows.start * width, rows.stop * width)
        return inputs | {
            "hidden_states": inputs["hidden_states"][:, own],
            "img_ids": inputs["img_ids"][..., own, :],
        }

    # -- what is known before a run --------------------------------------------------------------------------

    upscaled_shift = 3.0  # CLEAR, arXiv 2412.16112
    head_search = HeadSearch(scale=8.0, steps=15, side=512)  # published: arXiv 2506.10978

    def patch(self, config: Any) -> Grid:
        return 1, 2, 2  # packed by the pipeline

    def planned_layout(self, grid: Grid, text_len: int) -> TokenLayout:
        return TokenLayout(grid, text_len=text_len, text_first=True)

    def example_inputs(self, config: Any, grid: Grid, text_len: int, fill: Fill) -> dict[str, Any]:
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

    def reference_grid(self, pipeline: str) -> Grid | None:
        return (1, 64, 64) if "Kontext" in pipeline else None  # a megapixel

    def with_reference(self, inputs: dict[str, Any], grid: Grid, fill: Fill) -> dict[str, Any]:
        image, ids = inputs["hidden_states"], inputs["img_ids"]
        place = (torch.arange(n, dtype=ids.dtype, device=ids.device) for n in grid)
        behind = torch.cartesian_prod(*place)
        behind[:, 0] = 1
        return inputs | {
            "hidden_states": torch.cat([image, fill(len(image), len(behind), image.shape[2])], 1),
            "img_ids": torch.cat([ids, behind]),
        }


def grids_of_ids(ids: torch.Tensor) -> tuple[Grid, Grid | None]:
    """The token grids (1, H, W) of image and reference image (or None), from image ids (S, 3) or (B, S, 3).

    Raises:
        ValueError: ids that are not one or two full row-major grids.
    """
    image, *references = grids_of_images(ids)
    if image is None or None in references or len(references) > 1:
        raise ValueError(
            "the image ids of this FLUX call are not one full grid of tokens, nor those of one image and one "
            "reference image (Kontext), which accelerated attention does not support; "
            "`dit_accel.disable(pipe)` for such calls"
        )
    return image, references[0] if references else None


def grids_of_images(ids: torch.Tensor) -> list[Grid | None]:
    """The token grid (1, H, W) of each image one after the other, from ids (S, D) or (B, S, D).

    Columns of the ids are the image's number, row and column; more are not looked at. None stands for an
    image whose tokens are not a full row-major grid.
    """
    rows = (ids[0] if ids.ndim == 3 else ids).detach().cpu()
    starts = (rows[1:, 0] != rows[:-1, 0]).nonzero().flatten() + 1
    return [_grid(part) for part in rows[:, :3].tensor_split(starts)]


def _grid(rows: torch.Tensor) -> Grid | None:
    """The token grid behind the ids (S, 3) of one image."""
    start_of_row = (rows[:, 1] != rows[0, 1]).nonzero() if len(rows) else rows
    width = int(start_of_row[0]) if len(start_of_row) else len(rows)
    height = len(rows) // width if width else 0
    # in bf16, as pipelines pass them, places from 257 on are rounded
    places = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in (height, width))).view(-1, 2)
    if not len(rows) or height * width != len(rows):
        return None
    expected = (places + rows[0, 1:].long()).to(rows.dtype)
    return (1, height, width) if torch.equal(rows[:, 1:], expected) else None
