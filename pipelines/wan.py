"""Wan: self-attention (`attn1`) over video tokens alone; cross-attention to text (`attn2`) is left untouched.

Tokens are permuted and restored as latent patches at the transformer's border, where they are smallest, and
where neither LoRA nor cache hooks nor `torch.compile` of blocks can come between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dit_accel.layout import TokenLayout

from .attention import Family, Permute, SparseProcessor, move_patches, project_qkv


class WanProcessor(SparseProcessor):
    def project(self, attn, hidden_states, encoder_hidden_states, rotary):
        head_dim = attn.inner_dim // attn.heads
        q, k, v = project_qkv(attn, hidden_states)
        q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return q, k, v

    def output(self, attn, out, encoder_hidden_states):
        return attn.to_out[1](attn.to_out[0](out))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Wan's rotary embedding of x (B, S, H, D), on pairs of neighbouring channels; tables (1, S, 1, D)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


class Wan(Family):
    """With VACE's control blocks, where there are any, as the layers `vace` after `blocks`."""

    name = "wan"
    transformer = "WanTransformer3DModel"
    originals = ("WanAttnProcessor", "WanAttnProcessor2_0")
    processor = WanProcessor

    def layers(self, transformer: nn.Module) -> dict[str, nn.Module]:
        layers = {f"blocks.{i}": block.attn1 for i, block in enumerate(transformer.blocks)}
        control = enumerate(getattr(transformer, "vace_blocks", ()))
        return layers | {f"vace.{i}": block.attn1 for i, block in control}

    def blocks(self, transformer: nn.Module) -> tuple[nn.ModuleList, ...]:
        return (transformer.blocks,)

    def matches(self, transformer: nn.Module) -> bool:
        return super().matches(transformer) or type(transformer).__name__ == "WanVACETransformer3DModel"

    def layout(self, transformer: nn.Module, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        shape, patch = inputs["hidden_states"].shape[2:], transformer.config.patch_size
        return TokenLayout(tuple(n // p for n, p in zip(shape, patch, strict=True)))

    def enter(
        self, transformer: nn.Module, inputs: dict[str, Any], layout: TokenLayout, permute: Permute
    ) -> dict:
        patch = transformer.config.patch_size
        changed = {"hidden_states": move_patches(inputs["hidden_states"], layout.grid, patch, permute)}
        if (control := inputs.get("control_hidden_states")) is not None:
            if control.shape[2:] != inputs["hidden_states"].shape[2:]:
                raise ValueError(
                    "VACE's `control_hidden_states` must, in accelerated calls, have the frames, rows and "
                    f"columns of `hidden_states`, {tuple(inputs['hidden_states'].shape[2:])}, got "
                    f"{tuple(control.shape[2:])}; pad them, or `dit_accel.disable` it for such calls"
                )
            changed["control_hidden_states"] = move_patches(control, layout.grid, patch, permute)
        if inputs["timestep"].ndim == 2:  # Wan 2.2 5B: a timestep per token
            changed["timestep"] = permute(inputs["timestep"], 1)
        return inputs | changed

    def leave(
        self, transformer: nn.Module, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        return move_patches(sample, layout.grid, transformer.config.patch_size, restore)

    def placed_outputs(self, transformer: nn.Module) -> dict[nn.Module, int]:
        return {transformer.rope: 1}


FAMILY = Wan()
