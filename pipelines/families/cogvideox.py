"""CogVideoX and 1.5: joint attention over text, then video, in one stream of projections.

diffusers' processor calls PyTorch's attention itself, so its code cannot be reused. Positions are either
added where tokens are embedded (2B) or a rotary embedding, which the pipeline passes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel.masks.layout import TokenLayout

from .base import Family, Fill
from .joint import PlainProcessor
from .registry import register
from .splits import split_inputs, split_outputs, split_pair
from .tokens import Permute, move_patches

_FUSED = "FusedCogVideoXAttnProcessor2_0"


class CogVideoXProcessor(PlainProcessor):
    """Projects, normalises and rotates as diffusers does, through the layer's own modules."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.owner is None or self.models_own():
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=image_rotary_emb
            )
        length, tokens = encoder_hidden_states.shape[1], torch.cat([encoder_hidden_states, hidden_states], 1)
        if type(self.original).__name__ == _FUSED:
            parts = attn.to_qkv(tokens).chunk(3, dim=-1)
        else:
            parts = (attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens))
        q, k, v = (part.unflatten(-1, (attn.heads, -1)) for part in parts)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if image_rotary_emb is not None:
            from diffusers.models.embeddings import apply_rotary_emb

            def rotated(x: torch.Tensor) -> torch.Tensor:
                video = apply_rotary_emb(x[:, length:], image_rotary_emb, sequence_dim=1)
                return torch.cat([x[:, :length], video], dim=1)

            q, k = rotated(q), rotated(k)
        out = attn.to_out[1](attn.to_out[0](self.attend(q, k, v).flatten(2)))
        return out[:, length:], out[:, :length]


@register
class CogVideoX(Family):
    """Text before the video; with `patch_size_t` (1.5) tokens are of two frames."""

    name = "cogvideox"
    transformer = "CogVideoXTransformer3DModel"
    originals = ("CogVideoXAttnProcessor2_0", _FUSED)
    processor = CogVideoXProcessor
    stays_dense = "text tokens"
    parallel_refusal = None
    pure_noise = None  # it is no flow
    distillation_refusal = "they predict no flow"

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        return {f"blocks.{i}": block.attn1 for i, block in enumerate(transformer.transformer_blocks)}

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        return (transformer.transformer_blocks,)

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        frames, _, rows, columns = inputs["hidden_states"].shape[1:]
        sides = zip((frames, rows, columns), self.patch(transformer.config), strict=True)
        text_len = inputs["encoder_hidden_states"].shape[1]
        return TokenLayout(tuple(n // p for n, p in sides), text_len=text_len, text_first=True)

    def enter(self, transformer: Any, inputs: dict[str, Any], layout: TokenLayout, permute: Permute) -> dict:
        rotary = inputs.get("image_rotary_emb")
        return (
            inputs if rotary is None else inputs | {"image_rotary_emb": tuple(permute(x, 0) for x in rotary)}
        )

    def leave(
        self, transformer: Any, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        frames_last = sample.transpose(1, 2)  # (B, C, F, H, W)
        return move_patches(frames_last, layout.grid, self.patch(transformer.config), restore).transpose(1, 2)

    def parallel_plan(self, transformer: Any) -> dict[str, Any]:
        rotary = {"transformer_blocks.*": {"image_rotary_emb": split_pair(0)}}
        first = split_inputs("transformer_blocks.0", ("hidden_states", "encoder_hidden_states"))
        return rotary | first | split_outputs({})

    def placed_outputs(self, transformer: Any) -> dict[nn.Module, int | tuple[int, int]]:
        return {transformer.patch_embed: 1}

    # -- what is known before a run --------------------------------------------------------------------------

    video = True
    batches_guidance = True
    highres_refusal = "its positions beyond native size are not described"

    def patch(self, config: Any) -> tuple[int, int, int]:
        return getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size

    def planned_layout(self, grid: tuple[int, int, int], text_len: int) -> TokenLayout:
        return TokenLayout(grid, text_len=text_len, text_first=True)

    def example_inputs(
        self, config: Any, grid: tuple[int, int, int], text_len: int, fill: Fill
    ) -> dict[str, Any]:
        frames, rows, columns = (n * p for n, p in zip(grid, self.patch(config), strict=True))
        inputs: dict[str, Any] = {
            "hidden_states": fill(1, frames, config.in_channels, rows, columns),
            "encoder_hidden_states": fill(1, text_len, config.text_embed_dim),
            "timestep": fill(1).fill_(500),
        }
        if config.use_rotary_positional_embeddings:
            tokens = grid[0] * grid[1] * grid[2]
            inputs["image_rotary_emb"] = tuple(fill(tokens, config.attention_head_dim) for _ in range(2))
        if config.ofs_embed_dim:
            inputs["ofs"] = fill(1).fill_(2)
        return inputs

    def vae_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return int(config["temporal_compression_ratio"]), 2 ** (len(config["block_out_channels"]) - 1)

    def prompt_tokens(self, folder: Path, longest: int | None) -> int:
        return longest or 226
