"""Helios: chunks of a video after a history of earlier frames, at three resolutions, in one sequence.

The history stands in front of the chunk, where other families have text, and is attended densely. Its tokens
are embedded inside the transformer, so that tokens keep their places, and each layer moves them itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from dit_accel.masks.layout import TokenLayout

from .base import Fill
from .registry import register
from .wan import Wan

_HISTORY = {"short": (1, 2), "mid": (2, 2), "long": (4, 16)}  # patches of so many, and usual latent frames


@register
class Helios(Wan):
    """With history keys amplified or not, by diffusers' own code."""

    name = "helios"
    transformer = "HeliosTransformer3DModel"
    variants = ()
    highres_refusal = "its positions beyond native size are not described"
    originals = ("HeliosAttnProcessor",)
    distillation_refusal = "each chunk is given those before it"
    split_together = True
    gathered_per_layer = 3  # attention to video and to text, feed-forward
    stays_dense = "cross-attention to text; tokens of the history before a chunk"
    text_name = "history"
    moves_tokens = False

    def rotary_module(self, transformer: Any) -> None:
        return None

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        patch, history = transformer.config.patch_size, 0
        for name, (times, _) in _HISTORY.items():
            latents = inputs.get(f"latents_history_{name}")
            if latents is not None and inputs.get(f"indices_latents_history_{name}") is not None:
                history += math.prod(
                    n // p if times == 1 else -(-n // (p * times))  # the others are filled up
                    for n, p in zip(latents.shape[2:], patch, strict=True)
                )
        shape = inputs["hidden_states"].shape[2:]
        grid = tuple(n // p for n, p in zip(shape, patch, strict=True))
        return TokenLayout(grid, text_len=history, text_first=history > 0)

    def parallel_plan(self, transformer: Any) -> dict[str, Any]:
        """diffusers', which is of forty blocks, of the blocks that there are."""
        blocks = len(transformer.blocks)
        numbers = {place: place.split(".")[1] for place in transformer._cp_plan}
        return {
            place: part
            for place, part in transformer._cp_plan.items()
            if numbers[place] == "*" or int(numbers[place]) < blocks
        }

    def not_parallel(self, transformer: Any, inputs: dict[str, Any]) -> str | None:
        history = [name for name in _HISTORY if inputs.get(f"latents_history_{name}") is not None]
        if history and transformer.config.is_amplify_history:
            return (
                "a model with `is_amplify_history` counts the history's tokens inside, where each process "
                "has others; use one process for each prompt"
            )
        return super().not_parallel(transformer, inputs)

    def placed_outputs(self, transformer: Any) -> dict[nn.Module, int | tuple[int, int]]:
        return {}

    # -- what is known before a run --------------------------------------------------------------------------

    upscaled_shift = None

    def planned_layout(self, grid: tuple[int, int, int], text_len: int) -> TokenLayout:
        """With the history that its pipeline keeps."""
        history = sum(
            math.prod(-(-n // times) for n, times in zip((frames, *grid[1:]), (times,) * 3, strict=True))
            for times, frames in _HISTORY.values()
        )
        return TokenLayout(grid, text_len=history, text_first=True)

    def example_inputs(
        self, config: Any, grid: tuple[int, int, int], text_len: int, fill: Fill
    ) -> dict[str, Any]:
        inputs = super().example_inputs(config, grid, text_len, fill)
        device, first = inputs["timestep"].device, 0
        for name, (_, frames) in reversed(_HISTORY.items()):
            latents = fill(1, config.in_channels, frames, *inputs["hidden_states"].shape[3:])
            inputs[f"latents_history_{name}"] = latents
            indices = torch.arange(first, first + frames, device=device)[None]
            inputs[f"indices_latents_history_{name}"], first = indices, first + frames
        return inputs | {"indices_hidden_states": torch.arange(first, first + grid[0], device=device)[None]}
