"""Qwen-Image: double-stream blocks, text before the image, padded text hidden by a mask.

Images that Qwen-Image-Edit is given stand behind the picture: they are the layout's anchor, attended densely.
So is the picture that Qwen-Image-Layered takes apart; its layers are the frames of the grid.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from dit_accel.masks.layout import TokenLayout

from .base import Family, Fill
from .registry import register
from .tokens import Grid, Permute, anchor_of, move_image, read_once, valid_lengths

_MASK = "encoder_hidden_states_mask"


@register
class QwenImage(Family):
    """Qwen-Image and Qwen-Image-Edit: double-stream blocks alone, text before the visual tokens."""

    name = "qwen-image"
    transformer = "QwenImageTransformer2DModel"
    originals = ("QwenDoubleStreamAttnProcessor2_0",)
    stays_dense = "text tokens; given images (Edit, Layered)"
    pure_noise = 1.0
    parallel_refusal = None
    beside = "of given images"
    listed_inputs = ("img_shapes",)

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        return {f"blocks.{i}": block.attn for i, block in enumerate(transformer.transformer_blocks)}

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        return (transformer.transformer_blocks,)

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        grid, *given = shapes_of(inputs["img_shapes"])
        if transformer.config.get("use_layer3d_rope"):
            grid, given = _stacked([grid, *given[:-1]]), given[-1:]
        return TokenLayout(
            grid,
            text_len=inputs["encoder_hidden_states"].shape[1],
            text_first=True,
            anchor=anchor_of(given),
        )

    def text_valid(self, inputs: dict[str, Any], memo: dict) -> torch.Tensor | None:
        mask = inputs.get(_MASK)
        if mask is None:
            return None
        valid = read_once(memo, mask, partial(valid_lengths, name=_MASK))
        return valid.to(inputs["hidden_states"].device)

    def enter(self, transformer: Any, inputs: dict[str, Any], layout: TokenLayout, permute: Permute) -> dict:
        changed = {"hidden_states": move_image(inputs["hidden_states"], 1, layout, permute)}
        if inputs.get("controlnet_block_samples") is not None:
            samples = inputs["controlnet_block_samples"]
            changed["controlnet_block_samples"] = [move_image(x, 1, layout, permute) for x in samples]
        return inputs | changed

    def leave(
        self, transformer: Any, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        return move_image(sample, 1, layout, restore)

    def placed_outputs(self, transformer: Any) -> dict[nn.Module, int | tuple[int, int]]:
        return {transformer.pos_embed: 0}

    def move_placed(
        self, output: Any, dim: int | tuple[int, int], layout: TokenLayout, permute: Permute
    ) -> Any:
        """Its table of the image's places stands before that of the text's."""
        image, text = output
        return move_image(image, dim, layout, permute), text

    def refusal(self, module: nn.Module) -> str | None:
        names = vars(sys.modules[type(module.processor).__module__])
        if type(module.processor).__name__ in self.originals and _READS_MASK not in names:
            return "lets padded text be attended to, as older versions of diffusers do; update diffusers"
        return super().refusal(module)

    # -- what is known before a run --------------------------------------------------------------------------

    highres_refusal = "its autoencoder takes and gives videos"

    def patch(self, config: Any) -> Grid:
        return 1, 2, 2  # packed by the pipeline

    def planned_layout(self, grid: Grid, text_len: int) -> TokenLayout:
        return TokenLayout(grid, text_len=text_len, text_first=True)

    def example_inputs(self, config: Any, grid: Grid, text_len: int, fill: Fill) -> dict[str, Any]:
        return {
            "hidden_states": fill(1, grid[0] * grid[1] * grid[2], config.in_channels),
            "encoder_hidden_states": fill(1, text_len, config.joint_attention_dim),
            "timestep": fill(1).fill_(0.5),
            "img_shapes": [[grid]],
        }

    def with_reference(self, inputs: dict[str, Any], grid: Grid, fill: Fill) -> dict[str, Any]:
        image = inputs["hidden_states"]
        given = fill(len(image), grid[0] * grid[1] * grid[2], image.shape[2])
        shapes = [[*sample, grid] for sample in inputs["img_shapes"]]
        return inputs | {"hidden_states": torch.cat([image, given], 1), "img_shapes": shapes}

    def reference_grid(self, pipeline: str) -> Grid | None:
        return (1, 64, 64) if "Edit" in pipeline else None  # a megapixel

    def vae_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return 1, 2 ** len(config["temperal_downsample"])


_READS_MASK = "compute_text_seq_len_from_mask"  # diffusers' function; before it there was, masks were ignored


def shapes_of(img_shapes: Any) -> list[Grid]:
    """The token grids of one sample: the picture's and those of the images it is given.

    Args:
        img_shapes: as the transformer takes them: grids, or one of them, of each sample.

    Raises:
        ValueError: samples of different grids.
    """
    samples = img_shapes if isinstance(img_shapes, list) else [img_shapes]
    if any(sample != samples[0] for sample in samples):
        raise ValueError(
            f"the samples of a Qwen-Image call must have the same `img_shapes`, got {img_shapes}; call the "
            "transformer once for each, or `dit_accel.disable` it for such calls"
        )
    grids = samples[0] if isinstance(samples[0], list) else [samples[0]]
    return [tuple(grid) for grid in grids]


def _stacked(layers: list[Grid]) -> Grid:
    """The grid of layers of one size, each a frame."""
    if any(grid != layers[0] for grid in layers):
        raise ValueError(
            f"the layers of a Qwen-Image-Layered call must be of one size, got {layers}; "
            "`dit_accel.disable` it for such calls"
        )
    return len(layers) * layers[0][0], *layers[0][1:]
