"""SkyReels-V2: Wan with, in its diffusion forcing models, a timestep per frame and chunk-causal attention.

diffusers builds the chunk-causal mask (S, S) in every call: 8.1 GB for 97 frames at 720p, 90,000 tokens.
Here it is a pattern, `ChunkCausal`, whose block mask takes 2.4 MB, in all layers, dense ones included; what a
recipe says is computed within it. Pipelines for diffusion forcing step copies of their scheduler: the second
step is taken for a part of the first there (`runtime.sampler_runs.ScheduledRun`); the noisiest frame counts.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from dit_accel.masks.layout import TokenLayout

from .registry import register
from .tokens import Permute, move_patches
from .wan import Wan


@register
class SkyReelsV2(Wan):
    """Tokens are moved as latent patches, within their frame where frames have timesteps of their own."""

    name = "skyreels-v2"
    transformer = "SkyReelsV2Transformer3DModel"
    variants = ()
    parallel_refusal = "its timesteps of frames, and its mask of chunks, are made inside for all tokens"
    originals = ("SkyReelsV2AttnProcessor",)
    accelerates_dense = True
    hidden_config = MappingProxyType({"num_frame_per_block": 1})

    def enter(self, transformer: Any, inputs: dict[str, Any], layout: TokenLayout, permute: Permute) -> dict:
        moved = move_patches(inputs["hidden_states"], layout.grid, transformer.config.patch_size, permute)
        return inputs | {"hidden_states": moved}

    def chunk_frames(self, transformer: Any, inputs: dict[str, Any]) -> int | None:
        chunk = transformer.config["num_frame_per_block"]
        frames = inputs["hidden_states"].shape[2] // transformer.config.patch_size[0]
        if chunk > 1 and frames % chunk:
            raise ValueError(
                f"SkyReels-V2's `causal_block_size` must divide the latent frames, got {chunk} for {frames}; "
                "take another one or other `num_frames`"
            )
        return chunk if chunk > 1 or inputs.get("enable_diffusion_forcing") else None
