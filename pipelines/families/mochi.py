"""Mochi 1: joint attention over video, then text, of which every sample has its own number of tokens.

Text has projections and a width of its own; text that a mask hides is no part of attention. The rotary
embedding is learned for every head. diffusers' processor calls PyTorch's attention itself, sample by sample,
so its code cannot be reused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel.masks.layout import TokenLayout

from .base import Family, Fill
from .joint import JointProcessor
from .registry import register
from .splits import split_inputs, split_outputs
from .tokens import Permute, move_patches, read_once, valid_lengths


class MochiProcessor(JointProcessor):
    """With Mochi's rotary embedding. What hidden text attends to does not matter: nothing attends to it."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        call = self.original if self.owner is None or self.models_own() else super().__call__
        return call(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=image_rotary_emb
        )

    def rotated(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Pairs of neighbouring channels of x (B, S, H, D) by cosines and sines (S, H, D / 2)."""
        cos, sin = rotary
        even, odd = x.unflatten(-1, (-1, 2)).float().unbind(-1)
        parts = (even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)
        return torch.stack(parts, dim=-1).flatten(-2)


@register
class Mochi(Family):
    """Joint blocks, padded text after the video."""

    name = "mochi"
    transformer = "MochiTransformer3DModel"
    originals = ("MochiAttnProcessor2_0",)
    processor = MochiProcessor
    stays_dense = "text tokens"
    parallel_refusal = None
    pure_noise = 0.0
    toward_data = True

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        return {f"blocks.{i}": block.attn1 for i, block in enumerate(transformer.transformer_blocks)}

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        return (transformer.transformer_blocks,)

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        frames, rows, columns = inputs["hidden_states"].shape[2:]
        patch, text_len = transformer.config.patch_size, inputs["encoder_hidden_states"].shape[1]
        return TokenLayout((frames, rows // patch, columns // patch), text_len=text_len)

    def text_valid(self, inputs: dict[str, Any], memo: dict) -> torch.Tensor:
        valid = read_once(memo, inputs["encoder_attention_mask"], valid_lengths)
        return valid.to(inputs["hidden_states"].device)

    def enter(self, transformer: Any, inputs: dict[str, Any], layout: TokenLayout, permute: Permute) -> dict:
        patch = self.patch(transformer.config)
        return inputs | {"hidden_states": move_patches(inputs["hidden_states"], layout.grid, patch, permute)}

    def leave(
        self, transformer: Any, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        return move_patches(sample, layout.grid, self.patch(transformer.config), restore)

    def parallel_plan(self, transformer: Any) -> dict[str, Any]:
        first = split_inputs("transformer_blocks.0", ("hidden_states", "encoder_hidden_states"))
        return split_outputs({"rope": {0: 0, 1: 0}}) | first

    def placed_outputs(self, transformer: Any) -> dict[nn.Module, int | tuple[int, int]]:
        return {transformer.rope: 0}

    # -- what is known before a run --------------------------------------------------------------------------

    video = True
    batches_guidance = True
    highres_refusal = "its positions beyond native size are not described"

    def example_inputs(
        self, config: Any, grid: tuple[int, int, int], text_len: int, fill: Fill
    ) -> dict[str, Any]:
        latents = [n * p for n, p in zip(grid, self.patch(config), strict=True)]
        return {
            "hidden_states": fill(1, config.in_channels, *latents),
            "encoder_hidden_states": fill(1, text_len, config.text_embed_dim),
            "encoder_attention_mask": fill(1, text_len).fill_(1).bool(),
            "timestep": fill(1).fill_(500),
        }

    def vae_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        expansions = (
            config.get("temporal_expansions", (1, 2, 3)),
            config.get("spatial_expansions", (2, 2, 2)),
        )
        return math.prod(expansions[0]), math.prod(expansions[1])

    def prompt_tokens(self, folder: Path, longest: int | None) -> int:
        return longest or 256
