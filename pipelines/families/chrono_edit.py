"""ChronoEdit: Wan's self-attention over an image, frames of reasoning and the edited image.

Where the frames of reasoning are left out, the rotary embedding puts the edited image where the last of them
would be; its table is read from the module's output, and tokens may move as for Wan.
"""

from __future__ import annotations

from typing import Any

from .base import Fill
from .registry import register
from .wan import Wan, given_image


@register
class ChronoEdit(Wan):
    """Tokens are moved as latent patches, where they enter and leave the transformer."""

    name = "chrono-edit"
    transformer = "ChronoEditTransformer3DModel"
    variants = ()
    highres_refusal = "its positions beyond native size are not described"
    originals = ("WanAttnProcessor",)
    distillation_refusal = "they are given a picture to edit"
    upscaled_shift = None

    def rotary_module(self, transformer: Any) -> None:
        return None

    def example_inputs(
        self, config: Any, grid: tuple[int, int, int], text_len: int, fill: Fill
    ) -> dict[str, Any]:
        return super().example_inputs(config, grid, text_len, fill) | given_image(config, fill)
