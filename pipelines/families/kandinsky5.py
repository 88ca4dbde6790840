"""Kandinsky 5: self-attention over video tokens alone; cross-attention and the text's blocks are untouched.

Latents come with their channels last. Checkpoints for long videos attend by NABLA, which diffusers runs on
flex attention over tokens in tiles; such calls are refused, as blocks would be chosen twice.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from dit_accel.masks.layout import TokenLayout

from .base import Family, Fill
from .registry import register
from .splits import split_blocks
from .tokens import Permute, move_patches


@register
class Kandinsky5(Family):
    """Tokens are moved as latent patches."""

    name = "kandinsky-5"
    transformer = "Kandinsky5Transformer3DModel"
    originals = ("Kandinsky5AttnProcessor",)
    stays_dense = "cross-attention to text; the text's own blocks"
    parallel_refusal = None
    shared_inputs = ("visual_rope_pos", "text_rope_pos")
    text_places = ("text_rope_pos",)
    denoised_inputs = ("timestep",)
    projections = MappingProxyType(
        {"to_q": "to_query", "to_k": "to_key", "to_v": "to_value", "to_out.0": "out_layer"}
    )

    def heads(self, transformer: Any) -> tuple[int, int]:
        dim = sum(transformer.config.axes_dims)
        return transformer.config.model_dim // dim, dim

    def denoised(self, transformer: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Without the channels of a given image behind it."""
        return inputs["hidden_states"][..., : transformer.config.out_visual_dim]

    def with_denoised(
        self, inputs: dict[str, Any], latents: torch.Tensor, timestep: torch.Tensor
    ) -> dict[str, Any]:
        given = inputs["hidden_states"][..., latents.shape[-1] :]
        return super().with_denoised(inputs, torch.cat([latents, given], dim=-1), timestep)

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        blocks = enumerate(transformer.visual_transformer_blocks)
        return {f"blocks.{i}": block.self_attention for i, block in blocks}

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        return (transformer.visual_transformer_blocks,)

    def text_layers(self, transformer: Any) -> dict[str, nn.Module]:
        blocks = enumerate(transformer.visual_transformer_blocks)
        return {f"blocks.{i}.cross": block.cross_attention for i, block in blocks}

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        if inputs.get("sparse_params") is not None:
            raise ValueError(
                "this Kandinsky 5 call attends by NABLA (`attention_type` is "
                f"{transformer.config.attention_type!r}), which chooses blocks itself; take a transformer of "
                '`attention_type="regular"` and the preset "kandinsky-5-nabla", or `dit_accel.disable(pipe)` '
                "to compare with it"
            )
        sides = zip(inputs["hidden_states"].shape[1:4], transformer.config.patch_size, strict=True)
        return TokenLayout(tuple(n // p for n, p in sides))

    def enter(self, transformer: Any, inputs: dict[str, Any], layout: TokenLayout, permute: Permute) -> dict:
        return inputs | {"hidden_states": _moved(transformer, inputs["hidden_states"], layout, permute)}

    def leave(
        self, transformer: Any, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        return _moved(transformer, sample, layout, restore)

    def parallel_plan(self, transformer: Any) -> dict[str, Any]:
        return split_blocks("visual_transformer_blocks", transformer, {"visual_embed": 3}, {"rope": None})

    def placed_outputs(self, transformer: Any) -> dict[nn.Module, int | tuple[int, int]]:
        return {transformer.visual_rope_embeddings: (1, 3)}

    # -- what is known before a run --------------------------------------------------------------------------

    video = True
    highres_refusal = "its positions beyond native size are not described"

    def patch(self, config: Any) -> tuple[int, int, int]:
        return tuple(config.patch_size)

    def planned_layout(self, grid: tuple[int, int, int], text_len: int) -> TokenLayout:
        return TokenLayout(grid)  # text is no part of its self-attention

    def example_inputs(
        self, config: Any, grid: tuple[int, int, int], text_len: int, fill: Fill
    ) -> dict[str, Any]:
        latents = [n * p for n, p in zip(grid, config.patch_size, strict=True)]
        channels = config.in_visual_dim * (2 if config.visual_cond else 1) + bool(config.visual_cond)
        timestep = fill(1).fill_(500)
        return {
            "hidden_states": fill(1, *latents, channels),
            "encoder_hidden_states": fill(1, text_len, config.in_text_dim),
            "pooled_projections": fill(1, config.in_text_dim2),
            "timestep": timestep,
            "visual_rope_pos": [torch.arange(n, device=timestep.device) for n in grid],
            "text_rope_pos": torch.arange(text_len, device=timestep.device),
        }


def _moved(transformer: Any, latents: torch.Tensor, layout: TokenLayout, move: Permute) -> torch.Tensor:
    """Latents (B, F, H, W, C) with their patches moved."""
    patch = tuple(transformer.config.patch_size)
    return move_patches(latents.movedim(-1, 1), layout.grid, patch, move).movedim(1, -1)
