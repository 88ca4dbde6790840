"""HunyuanVideo: video before text, rotary embedding on video alone, padded text hidden by a mask.

Double-stream then single-stream blocks, in both of which video and text come and go apart. Tokens are
permuted as latent patches at the transformer's border, as for Wan. The text's own layers (`context_embedder`)
are left untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dit_accel.masks.layout import TokenLayout

from .base import Family, Fill, double_and_single, double_and_single_blocks
from .registry import register
from .splits import split_inputs, split_outputs
from .tokens import Permute, grid_positions, move_patches, read_once, valid_lengths


@register
class HunyuanVideo(Family):
    """HunyuanVideo: double-stream, then single-stream blocks, padded text after the video."""

    name = "hunyuan-video"
    transformer = "HunyuanVideoTransformer3DModel"
    originals = ("HunyuanVideoAttnProcessor2_0",)
    stays_dense = "text tokens; the text's own refiner"
    encodes = True
    parallel_refusal = None

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        return double_and_single(transformer)

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        return double_and_single_blocks(transformer)

    def rotary_module(self, transformer: Any) -> nn.Module:
        return transformer.rope

    def rotary_axes(self, transformer: Any, args: tuple) -> list[tuple[torch.Tensor, int]]:
        return grid_positions(args[0], _patch(transformer), transformer.rope.rope_dim)

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        shape, patch = inputs["hidden_states"].shape[2:], _patch(transformer)
        grid = tuple(n // p for n, p in zip(shape, patch, strict=True))
        return TokenLayout(grid, text_len=inputs["encoder_hidden_states"].shape[1])

    def text_valid(self, inputs: dict[str, Any], memo: dict) -> torch.Tensor:
        valid = read_once(memo, inputs["encoder_attention_mask"], valid_lengths)
        return valid.to(inputs["hidden_states"].device)

    def leading(self, transformer: Any, layout: TokenLayout) -> int:
        """The first frame, where it is the given image (`"token_replace"`): its modulation is another."""
        replaces = transformer.config.image_condition_type == "token_replace"
        return layout.grid[1] * layout.grid[2] if replaces else 0

    def parallel_plan(self, transformer: Any) -> dict[str, Any]:
        first = split_inputs("transformer_blocks.0", ("hidden_states", "encoder_hidden_states"))
        return split_outputs({"rope": {0: 0, 1: 0}}) | first

    def not_parallel(self, transformer: Any, inputs: dict[str, Any]) -> str | None:
        if getattr(transformer.config, "image_condition_type", None) == "token_replace":
            return (
                'a model with `image_condition_type` "token_replace" counts its first tokens inside, where '
                "each process has others; use one process for each prompt"
            )
        return super().not_parallel(transformer, inputs)

    def enter(self, transformer: Any, inputs: dict[str, Any], layout: TokenLayout, permute: Permute) -> dict:
        video = move_patches(inputs["hidden_states"], layout.grid, _patch(transformer), permute)
        return inputs | {"hidden_states": video}

    def leave(
        self, transformer: Any, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        return move_patches(sample, layout.grid, _patch(transformer), restore)

    def placed_outputs(self, transformer: Any) -> dict[nn.Module, int | tuple[int, int]]:
        return {transformer.rope: 0}

    # -- what is known before a run --------------------------------------------------------------------------

    video = True
    upscaled_shift = 9.0

    def example_inputs(
        self, config: Any, grid: tuple[int, int, int], text_len: int, fill: Fill
    ) -> dict[str, torch.Tensor]:
        latents = [n * p for n, p in zip(grid, self.patch(config), strict=True)]
        inputs = {
            "hidden_states": fill(1, config.in_channels, *latents),
            "encoder_hidden_states": fill(1, text_len, config.text_embed_dim),
            "encoder_attention_mask": fill(1, text_len).fill_(1).long(),
            "pooled_projections": fill(1, config.pooled_projection_dim),
            "timestep": fill(1).fill_(500),
        }
        return inputs | ({"guidance": fill(1).fill_(6000)} if config.guidance_embeds else {})


def _patch(transformer: Any) -> tuple[int, int, int]:
    config = transformer.config
    return config.patch_size_t, config.patch_size, config.patch_size
