"""Chroma: FLUX's double-stream, then single-stream blocks, with padded text that counts less than other text.

Its pipelines pass the mask of text as numbers, which diffusers adds to the scores: a padded token weighs what
another would over e, where a mask of booleans would hide it. Both are computed as diffusers does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from dit_accel.attention.call import LayerAttention
from dit_accel.attention.faded import Faded

from .base import Family, Fill, HeadSearch
from .flux import Flux
from .registry import register
from .tokens import Grid, read_once, valid_lengths


@register
class Chroma(Flux):
    """Chroma1: as FLUX.1, with a mask of the text; its modulation comes from one small network."""

    name = "chroma"
    transformer = "ChromaTransformer2DModel"
    stays_dense = "text tokens, padded ones among them"
    parallel_refusal = "its mask of text, which diffusers adds to scores, is of all tokens"
    band_dim = None

    def text_valid(self, inputs: dict[str, Any], memo: dict) -> torch.Tensor | None:
        return None if inputs.get("attention_mask") is None else _lengths(inputs, memo)[0]

    def with_other_text(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """With its mask, which is of text and image, for as many tokens as the image has."""
        mask, text_len = inputs.get("attention_mask"), inputs["encoder_hidden_states"].shape[1]
        if mask is None:
            return inputs
        image = mask.new_ones(len(mask), inputs["img_ids"].shape[-2])
        return inputs | {"attention_mask": torch.cat([mask[:, :text_len], image], 1)}

    def around(
        self, attentions: dict[str, LayerAttention], inputs: dict[str, Any], memo: dict
    ) -> dict[str, LayerAttention]:
        mask = inputs.get("attention_mask")
        if mask is None or mask.dtype == torch.bool:
            return attentions
        padded = _lengths(inputs, memo)[1]
        return {name: Faded(own, padded) for name, own in attentions.items()}

    # -- what is known before a run --------------------------------------------------------------------------

    highres_refusal = "its padded text is attended to, which windows of these methods do not know"
    upscaled_shift = None
    head_search = HeadSearch()

    def example_inputs(self, config: Any, grid: Grid, text_len: int, fill: Fill) -> dict[str, Any]:
        timestep = fill(1).fill_(0.5)
        place = (torch.arange(n, dtype=timestep.dtype, device=timestep.device) for n in grid)
        return {
            "hidden_states": fill(1, grid[1] * grid[2], config.in_channels),
            "encoder_hidden_states": fill(1, text_len, config.joint_attention_dim),
            "timestep": timestep,
            "img_ids": torch.cartesian_prod(*place),
            "txt_ids": fill(text_len, 3).zero_(),
            "attention_mask": fill(1, text_len + grid[1] * grid[2]).fill_(1),
        }

    def with_reference(self, inputs: dict[str, Any], grid: Grid, fill: Fill) -> dict[str, Any]:
        return Family.with_reference(self, inputs, grid, fill)

    def reference_grid(self, pipeline: str) -> None:
        return None


def _lengths(inputs: dict[str, Any], memo: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """How many text tokens of each sample are valid, and how many are padding, int32 (B,) each."""
    text_len = inputs["encoder_hidden_states"].shape[1]
    return read_once(memo, inputs["attention_mask"], partial(_read, text_len=text_len))


def _read(mask: torch.Tensor, text_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from a mask (B, S) of text and image.

    Raises:
        ValueError: padding of text that does not come last, or image tokens that are hidden.
    """
    valid = valid_lengths(mask[:, :text_len], "attention_mask")
    if not bool((mask[:, text_len:] == 1).all()):
        raise ValueError(
            "`attention_mask` must be one for all image tokens: accelerated layers take it for padded text "
            "alone; `dit_accel.disable` it for such calls"
        )
    return valid, text_len - valid
