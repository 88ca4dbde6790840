"""HunyuanVideo 1.5: video before text, double-stream blocks alone, padded text of three encoders.

diffusers' processor builds a mask (B, 1, S, S) in every layer, 12.9 GB for 121 frames at 720p; ours takes
padded text by its length, so that dense layers are accelerated as well. The transformer itself moves valid
text in front.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dit_accel.attention.call import AttentionCall
from dit_accel.masks.layout import TokenLayout

from .base import Fill
from .hunyuan_video import HunyuanVideo
from .joint import JointProcessor
from .registry import register
from .tokens import read_once

_IMAGE_TOKENS = 729  # of the conditioning image's encoder, zeros without an image


class HunyuanVideo15Processor(JointProcessor):
    """Dense layers hide padded text from all queries alike, by a mask (B, 1, 1, S)."""

    def dense(self, call: AttentionCall, attn_mask: torch.Tensor | None) -> torch.Tensor:
        hidden = call.hidden_keys()
        return self.dispatched(call, None if hidden is None else ~hidden[:, None, None])


@register
class HunyuanVideo15(HunyuanVideo):
    """HunyuanVideo 1.5: double-stream blocks alone, padded text of three encoders after the video."""

    name = "hunyuan-video-1.5"
    transformer = "HunyuanVideo15Transformer3DModel"
    originals = ("HunyuanVideo15AttnProcessor2_0",)
    processor = HunyuanVideo15Processor
    stays_dense = "tokens of text and of the given image; the text's own refiner"
    accelerates_dense = True
    denoised_inputs = ("timestep",)
    encodes = False

    def denoised(self, transformer: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Without the channels of a given image behind it."""
        return inputs["hidden_states"][:, : transformer.config.out_channels]

    def with_denoised(
        self, inputs: dict[str, Any], latents: torch.Tensor, timestep: torch.Tensor
    ) -> dict[str, Any]:
        given = inputs["hidden_states"][:, latents.shape[1] :]
        return super().with_denoised(inputs, torch.cat([latents, given], dim=1), timestep)

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        return {f"blocks.{i}": block.attn for i, block in enumerate(transformer.transformer_blocks)}

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        return (transformer.transformer_blocks,)

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        grid = super().layout(transformer, inputs, memo).grid
        texts = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
        return TokenLayout(grid, text_len=sum(inputs[name].shape[1] for name in texts))

    def text_valid(self, inputs: dict[str, Any], memo: dict) -> torch.Tensor:
        masks = (inputs["encoder_attention_mask"], inputs["encoder_attention_mask_2"])
        valid = sum(read_once(memo, mask, _count) for mask in masks)
        image = inputs["image_embeds"]
        shown = read_once(memo, image, torch.any)  # of any sample, as the transformer asks
        return (valid + shown * image.shape[1]).to(inputs["hidden_states"].device)

    def leading(self, transformer: Any, layout: TokenLayout) -> int:
        return 0

    def example_inputs(
        self, config: Any, grid: tuple[int, int, int], text_len: int, fill: Fill
    ) -> dict[str, torch.Tensor]:
        latents = [n * p for n, p in zip(grid, self.patch(config), strict=True)]
        glyphs = 256
        words = text_len - glyphs - _IMAGE_TOKENS
        return {
            "hidden_states": fill(1, config.in_channels, *latents),
            "timestep": fill(1).fill_(500),
            "encoder_hidden_states": fill(1, words, config.text_embed_dim),
            "encoder_attention_mask": fill(1, words).fill_(1).long(),
            "encoder_hidden_states_2": fill(1, glyphs, config.text_embed_2_dim),
            "encoder_attention_mask_2": fill(1, glyphs).fill_(1).long(),
            "image_embeds": fill(1, _IMAGE_TOKENS, config.image_embed_dim),
        }


def _count(mask: torch.Tensor) -> torch.Tensor:
    return mask.bool().sum(dim=1, dtype=torch.int32)
