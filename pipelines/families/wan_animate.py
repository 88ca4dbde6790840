"""Wan Animate: Wan's self-attention; poses are added to all frames but the first, faces told by frame.

Both are by place inside the transformer, so that tokens keep theirs, and each layer moves them itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Fill
from .registry import register
from .wan import Wan, given_image


@register
class WanAnimate(Wan):
    """The face adapter between blocks attends to each frame's face densely."""

    name = "wan-animate"
    transformer = "WanAnimateTransformer3DModel"
    variants = ()
    highres_refusal = "its positions beyond native size are not described"
    parallel_refusal = "its face adapter tells frames by the places of all tokens"
    originals = ("WanAttnProcessor",)
    stays_dense = "cross-attention to text and to the character's image; the face adapter"
    distillation_refusal = "they are given a character and its motion"
    moves_tokens = False

    def rotary_module(self, transformer: Any) -> None:
        return None

    def placed_outputs(self, transformer: Any) -> dict[nn.Module, int | tuple[int, int]]:
        return {}

    def example_inputs(
        self, config: Any, grid: tuple[int, int, int], text_len: int, fill: Fill
    ) -> dict[str, Any]:
        inputs = super().example_inputs(config, grid, text_len, fill)
        frames, rows, columns = inputs["hidden_states"].shape[2:]
        side = config.motion_encoder_size
        return (
            inputs
            | given_image(config, fill)
            | {
                "pose_hidden_states": fill(1, config.latent_channels, frames - 1, rows, columns),
                "face_pixel_values": fill(1, 3, 4 * (frames - 1), side, side),
            }
        )
