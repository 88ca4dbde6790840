"""SD3 and SD3.5: joint attention over image, then text; SD3.5's dual layers attend the image alone as well.

There is no rotary embedding: tokens get their places inside `pos_embed`, so they are permuted as they leave
it, and restored as latent patches at the transformer's border.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel.json_files import read_json
from dit_accel.masks.layout import TokenLayout

from .base import Family, Fill, HeadSearch
from .joint import JointProcessor
from .registry import register
from .splits import split_outputs
from .tokens import Permute, move_patches

_FUSED = "FusedJointAttnProcessor2_0"


class SD3Processor(JointProcessor):
    """diffusers' processors call PyTorch's attention themselves, so their code cannot be reused."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *args, **kwargs):
        if self.models_own():
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        return super().__call__(attn, hidden_states, encoder_hidden_states)

    @property
    def fused(self) -> bool:
        """Not `attn.fused_projections`, which `unfuse_qkv_projections` leaves set."""
        return type(self.original).__name__ == _FUSED


@register
class SD3(Family):
    """Stable Diffusion 3 and 3.5: joint blocks, text after the visual tokens, dual layers as `attn2`."""

    name = "sd3"
    transformer = "SD3Transformer2DModel"
    originals = ("JointAttnProcessor2_0", "XFormersJointAttnProcessor", _FUSED)
    processor = SD3Processor
    stays_dense = "text tokens"
    encodes = True

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        blocks = list(enumerate(transformer.transformer_blocks))
        joint = {f"blocks.{i}": block.attn for i, block in blocks}
        return joint | {f"blocks.{i}.attn2": block.attn2 for i, block in blocks if block.attn2 is not None}

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        return (transformer.transformer_blocks,)

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        (height, width), patch = inputs["hidden_states"].shape[-2:], transformer.config.patch_size
        return TokenLayout(
            (1, height // patch, width // patch), text_len=inputs["encoder_hidden_states"].shape[1]
        )

    def layer_layout(self, name: str, layout: TokenLayout) -> TokenLayout:
        return dataclasses.replace(layout, text_len=0) if name.endswith(".attn2") else layout

    def enter(self, transformer: Any, inputs: dict[str, Any], layout: TokenLayout, permute: Permute) -> dict:
        residuals = inputs.get("block_controlnet_hidden_states")
        if residuals is None:
            return inputs
        return inputs | {"block_controlnet_hidden_states": [permute(sample, 1) for sample in residuals]}

    def leave(
        self, transformer: Any, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        patch = transformer.config.patch_size
        return move_patches(sample, layout.grid, (1, patch, patch), restore)

    def placed_outputs(self, transformer: Any) -> dict[nn.Module, int | tuple[int, int]]:
        return {transformer.pos_embed: 1}

    parallel_refusal = None

    def parallel_plan(self, transformer: Any) -> dict[str, Any]:
        return split_outputs({"pos_embed": {0: 1}, "context_embedder": {0: 1}})

    def refusal(self, module: nn.Module) -> str | None:
        second = getattr(module, "add_q_proj", None) is None
        if type(module.processor).__name__ == _FUSED and (second or module.norm_q is not None):
            return (
                f"has diffusers' {_FUSED}, which leaves out the QK norm of SD3.5 and cannot run `attn2`; "
                "call `transformer.unfuse_qkv_projections()` first"
            )
        return super().refusal(module)

    # -- what is known before a run --------------------------------------------------------------------------

    upscaled_shift = 6.0
    batches_guidance = True
    head_search = HeadSearch(scale=3.0, steps=20)  # published: arXiv 2506.10978

    def example_inputs(
        self, config: Any, grid: tuple[int, int, int], text_len: int, fill: Fill
    ) -> dict[str, torch.Tensor]:
        rows, columns = (n * config.patch_size for n in grid[1:])
        return {
            "hidden_states": fill(1, config.in_channels, rows, columns),
            "encoder_hidden_states": fill(1, text_len, config.joint_attention_dim),
            "pooled_projections": fill(1, config.pooled_projection_dim),
            "timestep": fill(1).fill_(500),
        }

    def prompt_tokens(self, folder: Path, longest: int | None) -> int:
        """Those of CLIP stand before those of T5."""
        path = folder / "tokenizer" / "tokenizer_config.json"
        clip = read_json(path).get("model_max_length", 77) if path.is_file() else 77
        return clip + (longest or 256)
