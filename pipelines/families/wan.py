"""Wan: self-attention (`attn1`) over video tokens alone; cross-attention to text (`attn2`) is left untouched.

Tokens are permuted and restored as latent patches at the transformer's border, where they are smallest, and
where neither LoRA nor cache hooks nor `torch.compile` of blocks can come between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dit_accel.masks.layout import TokenLayout

from .base import Family, Fill
from .registry import register
from .tokens import Permute, grid_positions, move_patches


@register
class Wan(Family):
    """With VACE's control blocks, where there are any, as the layers `vace` after `blocks`."""

    name = "wan"
    transformer = "WanTransformer3DModel"
    variants: tuple[str, ...] = ("WanVACETransformer3DModel",)
    originals = ("WanAttnProcessor", "WanAttnProcessor2_0")
    parallel_refusal = None
    stays_dense = "cross-attention to text and to a given image"
    encodes = True

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        layers = {f"blocks.{i}": block.attn1 for i, block in enumerate(transformer.blocks)}
        control = enumerate(getattr(transformer, "vace_blocks", ()))
        return layers | {f"vace.{i}": block.attn1 for i, block in control}

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        return (transformer.blocks,)

    def text_layers(self, transformer: Any) -> dict[str, nn.Module]:
        texts = {f"blocks.{i}.attn2": block.attn2 for i, block in enumerate(transformer.blocks)}
        control = enumerate(getattr(transformer, "vace_blocks", ()))
        return texts | {f"vace.{i}.attn2": block.attn2 for i, block in control}

    def rotary_module(self, transformer: Any) -> nn.Module:
        return transformer.rope

    def rotary_axes(self, transformer: Any, args: tuple) -> list[tuple[torch.Tensor, int]]:
        rope = transformer.rope
        return grid_positions(args[0], rope.patch_size, (rope.t_dim, rope.h_dim, rope.w_dim))

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        shape, patch = inputs["hidden_states"].shape[2:], transformer.config.patch_size
        return TokenLayout(tuple(n // p for n, p in zip(shape, patch, strict=True)))

    def enter(self, transformer: Any, inputs: dict[str, Any], layout: TokenLayout, permute: Permute) -> dict:
        patch = transformer.config.patch_size
        changed = {"hidden_states": move_patches(inputs["hidden_states"], layout.grid, patch, permute)}
        if (control := inputs.get("control_hidden_states")) is not None:
            if control.shape[2:] != inputs["hidden_states"].shape[2:]:
                raise ValueError(
                    "VACE's `control_hidden_states` must, in accelerated calls, have the frames, rows and "
                    f"columns of `hidden_states`, {tuple(inputs['hidden_states'].shape[2:])}, got "
                    f"{tuple(control.shape[2:])}; pad them, or `dit_accel.disable` it for such calls"
                )
            changed["control_hidden_states"] = move_patches(control, layout.grid, patch, permute)
        if inputs["timestep"].ndim == 2:  # Wan 2.2 5B: a timestep per token
            changed["timestep"] = permute(inputs["timestep"], 1)
        return inputs | changed

    def leave(
        self, transformer: Any, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        return move_patches(sample, layout.grid, transformer.config.patch_size, restore)

    def placed_outputs(self, transformer: Any) -> dict[nn.Module, int | tuple[int, int]]:
        return {transformer.rope: 1}

    # -- what is known before a run --------------------------------------------------------------------------

    video = True
    upscaled_shift = 9.0  # FreeSwim

    def patch(self, config: Any) -> tuple[int, int, int]:
        return tuple(config.patch_size)

    def planned_layout(self, grid: tuple[int, int, int], text_len: int) -> TokenLayout:
        return TokenLayout(grid)  # text is no part of its self-attention

    def example_inputs(
        self, config: Any, grid: tuple[int, int, int], text_len: int, fill: Fill
    ) -> dict[str, torch.Tensor]:
        latents = [n * p for n, p in zip(grid, self.patch(config), strict=True)]
        return {
            "hidden_states": fill(1, config.in_channels, *latents),
            "encoder_hidden_states": fill(1, text_len, config.text_dim),
            "timestep": fill(1).fill_(500),
        }


def given_image(config: Any, fill: Fill) -> dict[str, torch.Tensor]:
    """What a transformer is told of an image by CLIP, as an example; nothing where it takes none."""
    return {"encoder_hidden_states_image": fill(1, 257, config.image_dim)} if config.image_dim else {}
