"""Z-Image: one stream of image, then caption, each filled up to a multiple of 32 tokens.

What fills up the image is the layout's anchor, as it attends and is attended to like any token; what fills up
captions is text. The model makes places inside its forward, without a module, so that tokens stay in their
order and each layer moves them. The refiners before the stream, of image and of caption, stay as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from dit_accel.errors import UnavailableError
from dit_accel.masks.layout import TokenLayout

from .base import Family, Fill
from .registry import register
from .splits import split_blocks
from .tokens import Grid

_MULTIPLE = 32  # a number that stands in diffusers


@register
class ZImage(Family):
    """Z-Image and Z-Image-Turbo: single-stream blocks, the caption after the visual tokens."""

    name = "z-image"
    transformer = "ZImageTransformer2DModel"
    originals = ("ZSingleStreamAttnProcessor",)
    stays_dense = "caption tokens; tokens that fill up the image; the refiners of image and caption"
    beside = "that fill up the image"
    moves_tokens = False
    parallel_refusal = None
    split_together = True
    pure_noise = 1.0
    toward_data = True
    listed_inputs = ("cap_feats",)
    denoised_inputs = ("x", "t")

    def heads(self, transformer: Any) -> tuple[int, int]:
        config = transformer.config
        return config.n_heads, config.dim // config.n_heads

    def latents(self, inputs: dict[str, Any]) -> torch.Tensor:
        return _samples(inputs)[0]

    def timestep(self, inputs: dict[str, Any]) -> torch.Tensor:
        return 1 - inputs["t"]  # which rises from 0

    def conditional(self, pipeline: Any, inputs: dict[str, Any]) -> slice:
        """The first half, where its pipeline guides."""
        samples = len(inputs["x"])
        guided = getattr(pipeline, "do_classifier_free_guidance", False) and samples % 2 == 0
        return slice(0, samples // 2 if guided else samples)

    def denoised(self, transformer: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return torch.stack(_samples(inputs))

    def with_denoised(
        self, inputs: dict[str, Any], latents: torch.Tensor, timestep: torch.Tensor
    ) -> dict[str, Any]:
        return inputs | {"x": list(latents), "t": 1 - timestep}

    def predicted(self, sample: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(sample)

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        return {f"blocks.{i}": block.attention for i, block in enumerate(transformer.layers)}

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        raise UnavailableError(
            "guidance needs a transformer whose samples are one tensor, and Z-Image takes and gives lists of "
            "them; use guidance=None"
        )

    def parallel_plan(self, transformer: Any) -> dict[str, Any]:
        """Of the image's refiner and of the blocks; captions are refined whole in every process."""
        parts = ("noise_refiner", "layers")
        plans = [split_blocks(part, transformer, {"x": 3}, {"freqs_cis": 3}) for part in parts]
        return {place: split for plan in plans for place, split in plan.items()}

    def exchanging(self, transformer: Any) -> list[nn.Module]:
        return [block.attention for block in transformer.noise_refiner]

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        shapes = {tuple(sample.shape[1:]) for sample in _samples(inputs)}
        if len(shapes) > 1:
            raise ValueError(
                f"the samples of a Z-Image call must be of one size, got latents of {sorted(shapes)}; call "
                "the transformer once for each, or `dit_accel.disable` it for such calls"
            )
        (frames, rows, columns), side = shapes.pop(), inputs.get("patch_size", 2)
        grid = frames // inputs.get("f_patch_size", 1), rows // side, columns // side
        return _layout(grid, max(_captions(inputs)))

    def text_valid(self, inputs: dict[str, Any], memo: dict) -> torch.Tensor | None:
        """Captions are filled up to a multiple of 32 each, and behind that to the longest by padding."""
        lengths = _captions(inputs)
        if len(set(lengths)) == 1:
            return None
        return torch.tensor(lengths, dtype=torch.int32, device=self.latents(inputs).device)

    # -- what is known before a run --------------------------------------------------------------------------

    highres_refusal = "its transformer takes and gives lists of latents"

    def patch(self, config: Any) -> Grid:
        return config.all_f_patch_size[0], config.all_patch_size[0], config.all_patch_size[0]

    def planned_layout(self, grid: Grid, text_len: int) -> TokenLayout:
        return _layout(grid, _filled_up(text_len))

    def example_inputs(self, config: Any, grid: Grid, text_len: int, fill: Fill) -> dict[str, Any]:
        latents = [n * p for n, p in zip(grid, self.patch(config), strict=True)]
        return {
            "x": [fill(config.in_channels, *latents)],
            "t": fill(1).fill_(0.5),
            "cap_feats": [fill(text_len, config.cap_feat_dim)],
        }


def _layout(grid: Grid, text_len: int) -> TokenLayout:
    more = -math.prod(grid) % _MULTIPLE
    return TokenLayout(grid, text_len=text_len, anchor=(1, 1, more) if more else None)


def _samples(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Latents (C, F, H, W) of each sample.

    Raises:
        ValueError: samples of several images.
    """
    samples = inputs["x"]
    if isinstance(samples[0], list):
        raise ValueError(
            "Z-Image-Omni's calls of several images a sample are not supported, as captions stand between "
            "them; `dit_accel.disable` it for such calls"
        )
    return samples


def _captions(inputs: dict[str, Any]) -> list[int]:
    return [_filled_up(len(caption)) for caption in inputs["cap_feats"]]


def _filled_up(length: int) -> int:
    return length + -length % _MULTIPLE
