"""FLUX.2: text before image, rotary embedding on all tokens, double, then parallel single-stream blocks.

Reference images stand behind the picture: together they are the layout's anchor, attended densely.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from dit_accel.masks.layout import TokenLayout

from .base import Fill
from .flux import Flux, grids_of_images
from .registry import register
from .tokens import Grid, anchor_of, read_once


@register
class Flux2(Flux):
    """FLUX.2 dev and klein: double-stream, then parallel single-stream blocks; any number of references."""

    name = "flux2"
    transformer = "Flux2Transformer2DModel"
    originals = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")
    stays_dense = "text tokens; reference images"
    beside = "of reference images"
    shared_inputs = text_places = ()  # each sample has its own places
    encodes = False
    projections = MappingProxyType(
        {"to_q": "to_qkv_mlp_proj", "to_out.0": "to_out"}
    )  # of parallel blocks, with their MLP

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        if inputs.get("kv_cache_mode") is not None:
            raise ValueError(
                "FLUX.2's `kv_cache_mode` attends from the picture to cached reference images, which "
                "accelerated attention does not support; use Flux2KleinPipeline, or `dit_accel.disable` the "
                "transformer for such calls"
            )
        grid, references = read_once(memo, inputs["img_ids"], _grids)
        text_len = inputs["encoder_hidden_states"].shape[1]
        return TokenLayout(grid, text_len=text_len, text_first=True, anchor=anchor_of(references))

    def refusal(self, module: nn.Module) -> str | None:
        if "KV" in (name := type(module.processor).__name__):
            return (
                f"has the attention processor {name}, whose reference images attend to themselves alone and "
                "are cached; use Flux2KleinPipeline instead of Flux2KleinKVPipeline"
            )
        return super().refusal(module)

    # -- what is known before a run --------------------------------------------------------------------------

    highres_refusal = "its pipeline normalises packed latents by statistics of its autoencoder"
    upscaled_shift = None

    def example_inputs(self, config: Any, grid: Grid, text_len: int, fill: Fill) -> dict[str, Any]:
        timestep = fill(1).fill_(0.5)

        def ids(*sizes: int) -> torch.Tensor:
            place = (torch.arange(n, dtype=timestep.dtype, device=timestep.device) for n in sizes)
            return torch.cartesian_prod(*place)

        inputs = {
            "hidden_states": fill(1, grid[1] * grid[2], config.in_channels),
            "encoder_hidden_states": fill(1, text_len, config.joint_attention_dim),
            "timestep": timestep,
            "img_ids": ids(*grid, 1),
            "txt_ids": ids(1, 1, 1, text_len),
        }
        return inputs | ({"guidance": fill(1).fill_(4)} if config.guidance_embeds else {})

    def with_reference(self, inputs: dict[str, Any], grid: Grid, fill: Fill) -> dict[str, Any]:
        made = super().with_reference(inputs | {"img_ids": inputs["img_ids"][:, :3]}, grid, fill)
        ids = made["img_ids"]
        return made | {"img_ids": torch.cat([ids, torch.zeros_like(ids[:, :1])], 1)}

    def reference_grid(self, pipeline: str) -> Grid | None:
        return None  # its pipelines take pictures without references as well


def _grids(ids: torch.Tensor) -> tuple[Grid, list[Grid]]:
    """The token grids of the picture and of reference images, from image ids (S, 4) or (B, S, 4).

    Raises:
        ValueError: ids that are not full row-major grids.
    """
    found = grids_of_images(ids)
    grids = [grid for grid in found if grid is not None]
    if len(grids) < len(found):
        raise ValueError(
            "the image ids of this FLUX.2 call are not full grids of tokens, of the picture and of each "
            "reference image; `dit_accel.disable(pipe)` for such calls"
        )
    return grids[0], grids[1:]
