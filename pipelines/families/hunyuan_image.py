"""HunyuanImage: image before text, rotary embedding on the image alone, padded text of two encoders.

Double-stream then single-stream blocks, as HunyuanVideo; the transformer itself moves valid text in front.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.masks.layout import TokenLayout

from .base import Fill
from .hunyuan_video import HunyuanVideo
from .registry import register
from .tokens import Grid, Permute, move_patches, read_once, valid_lengths


@register
class HunyuanImage(HunyuanVideo):
    """HunyuanImage 2.1, its distilled model and its refiner: padded text after the visual tokens."""

    name = "hunyuan-image"
    transformer = "HunyuanImageTransformer2DModel"
    originals = ("HunyuanImageAttnProcessor",)
    stays_dense = "text tokens; the text's own refiner"
    encodes = False

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        patch, shape = self.patch(transformer.config), inputs["hidden_states"].shape[2:]
        grid = tuple(n // p for n, p in zip((1, *shape)[-3:], patch, strict=True))
        return TokenLayout(grid, text_len=sum(text.shape[1] for text in _texts(inputs, "hidden_states")))

    def text_valid(self, inputs: dict[str, Any], memo: dict) -> torch.Tensor:
        masks = _texts(inputs, "attention_mask")
        read = valid_lengths if len(masks) == 1 else _count  # of one text the padding stays where it is
        return (
            torch.stack([read_once(memo, mask, read) for mask in masks])
            .sum(0, dtype=torch.int32)
            .to(inputs["hidden_states"].device)
        )

    def leading(self, transformer: Any, layout: TokenLayout) -> int:
        return 0

    def enter(self, transformer: Any, inputs: dict[str, Any], layout: TokenLayout, permute: Permute) -> dict:
        patch = self.patch(transformer.config)
        return inputs | {"hidden_states": move_patches(inputs["hidden_states"], layout.grid, patch, permute)}

    def leave(
        self, transformer: Any, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        return move_patches(sample, layout.grid, self.patch(transformer.config), restore)

    # -- what is known before a run --------------------------------------------------------------------------

    video = False
    highres_refusal = "its pipeline takes guiders and no guidance scale"
    upscaled_shift = None

    def patch(self, config: Any) -> Grid:
        frames, rows, columns = (1, *config.patch_size)[-3:]
        return frames, rows, columns

    def example_inputs(self, config: Any, grid: Grid, text_len: int, fill: Fill) -> dict[str, Any]:
        latents = [n * p for n, p in zip(grid, self.patch(config), strict=True)][-len(config.patch_size) :]
        glyphs = 0 if config.text_embed_2_dim is None else _GLYPHS
        inputs = {
            "hidden_states": fill(1, config.in_channels, *latents),
            "timestep": fill(1).fill_(500),
            "encoder_hidden_states": fill(1, text_len - glyphs, config.text_embed_dim),
            "encoder_attention_mask": fill(1, text_len - glyphs).fill_(1).long(),
        }
        if glyphs:
            inputs["encoder_hidden_states_2"] = fill(1, glyphs, config.text_embed_2_dim)
            inputs["encoder_attention_mask_2"] = fill(1, glyphs).fill_(1).long()
        if config.use_meanflow:
            inputs["timestep_r"] = fill(1).fill_(480)
        return inputs | ({"guidance": fill(1).fill_(3250)} if config.guidance_embeds else {})


_GLYPHS = 128  # tokens of the second text, what is written in the picture


def _texts(inputs: dict[str, Any], kind: str) -> list[torch.Tensor]:
    """`encoder_<kind>` of each text there is."""
    ends = [end for end in ("", "_2") if inputs.get(f"encoder_hidden_states{end}") is not None]
    return [inputs[f"encoder_{kind}{end}"] for end in ends]


def _count(mask: torch.Tensor) -> torch.Tensor:
    return mask.bool().sum(dim=1, dtype=torch.int32)
