"""SD3 and SD3.5: joint attention over image, then text; SD3.5's dual layers attend the image alone as well.

There is no rotary embedding: tokens get their places inside `pos_embed`, so they are permuted as they leave
it, and restored as latent patches at the transformer's border.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from dit_accel.layout import TokenLayout

from .attention import Family, Permute, SparseProcessor, move_patches, project_qkv, project_text_qkv

_FUSED = "FusedJointAttnProcessor2_0"


class SD3Processor(SparseProcessor):
    def project(self, attn, hidden_states, encoder_hidden_states, rotary):
        # not `attn.fused_projections`, which `unfuse_qkv_projections` leaves set
        fused = type(self.original).__name__ == _FUSED
        head_dim = attn.inner_dim // attn.heads
        q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in project_qkv(attn, hidden_states, fused))
        q, k = _norm(attn.norm_q, q), _norm(attn.norm_k, k)
        if encoder_hidden_states is not None:
            text_q, text_k, text_v = (
                x.unflatten(-1, (-1, head_dim)) for x in project_text_qkv(attn, encoder_hidden_states, fused)
            )
            q = torch.cat([q, _norm(attn.norm_added_q, text_q)], dim=1)
            k = torch.cat([k, _norm(attn.norm_added_k, text_k)], dim=1)
            v = torch.cat([v, text_v], dim=1)
        return q, k, v

    def output(self, attn, out, encoder_hidden_states):
        image, text = out[:, : self.layout.visual_len], out[:, self.layout.visual_len :]
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text.contiguous())


def _norm(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)


class SD3(Family):
    name = "sd3"
    transformer = "SD3Transformer2DModel"
    originals = ("JointAttnProcessor2_0", "XFormersJointAttnProcessor", _FUSED)
    processor = SD3Processor

    def layers(self, transformer: nn.Module) -> dict[str, nn.Module]:
        blocks = list(enumerate(transformer.transformer_blocks))
        joint = {f"blocks.{i}": block.attn for i, block in blocks}
        return joint | {f"blocks.{i}.attn2": block.attn2 for i, block in blocks if block.attn2 is not None}

    def blocks(self, transformer: nn.Module) -> tuple[nn.ModuleList, ...]:
        return (transformer.transformer_blocks,)

    def conditional(self, pipeline: Any, inputs: dict[str, Any]) -> slice:
        """With classifier-free guidance the second half: pipelines batch it with the unconditional half.

        Both halves then hold the same latents. A loop of one's own is taken at that, a pipeline that runs
        without guidance is not.
        """
        latents = inputs["hidden_states"]
        half = len(latents) // 2
        batched = getattr(pipeline, "do_classifier_free_guidance", True) and len(latents) == 2 * half
        if batched and torch.equal(latents[:half], latents[half:]):
            return slice(half, 2 * half)
        return super().conditional(pipeline, inputs)

    def layout(self, transformer: nn.Module, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        (height, width), patch = inputs["hidden_states"].shape[-2:], transformer.config.patch_size
        return TokenLayout(
            (1, height // patch, width // patch), text_len=inputs["encoder_hidden_states"].shape[1]
        )

    def layer_layout(self, name: str, layout: TokenLayout) -> TokenLayout:
        return dataclasses.replace(layout, text_len=0) if name.endswith(".attn2") else layout

    def enter(
        self, transformer: nn.Module, inputs: dict[str, Any], layout: TokenLayout, permute: Permute
    ) -> dict:
        residuals = inputs.get("block_controlnet_hidden_states")
        if residuals is None:
            return inputs
        return inputs | {"block_controlnet_hidden_states": [permute(sample, 1) for sample in residuals]}

    def leave(
        self, transformer: nn.Module, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        patch = transformer.config.patch_size
        return move_patches(sample, layout.grid, (1, patch, patch), restore)

    def placed_outputs(self, transformer: nn.Module) -> dict[nn.Module, int]:
        return {transformer.pos_embed: 1}

    def refusal(self, module: nn.Module) -> str | None:
        second = getattr(module, "add_q_proj", None) is None
        if type(module.processor).__name__ == _FUSED and (second or module.norm_q is not None):
            return (
                f"has diffusers' {_FUSED}, which leaves out the QK norm of SD3.5 and cannot run `attn2`; "
                "call `transformer.unfuse_qkv_projections()` first"
            )
        return super().refusal(module)


FAMILY = SD3()
