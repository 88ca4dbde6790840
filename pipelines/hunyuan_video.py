"""HunyuanVideo: video before text, rotary embedding on video alone, padded text hidden by a mask.

Double-stream then single-stream blocks, in both of which video and text come and go apart. Tokens are
permuted as latent patches at the transformer's border, as for Wan. The text's own layers (`context_embedder`)
are left untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dit_accel.layout import TokenLayout

from .attention import (
    Family,
    Permute,
    SparseProcessor,
    double_and_single,
    double_and_single_blocks,
    move_patches,
    read_once,
)


class HunyuanVideoProcessor(SparseProcessor):
    def project(self, attn, hidden_states, encoder_hidden_states, rotary):
        from diffusers.models.embeddings import apply_rotary_emb

        video = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        text = video
        if attn.add_q_proj is not None:
            text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
        head_dim = attn.inner_dim // attn.heads
        q, k, v = _project(hidden_states, head_dim, *video)
        if rotary is not None:
            q = apply_rotary_emb(q, rotary, sequence_dim=1)
            k = apply_rotary_emb(k, rotary, sequence_dim=1)
        text_q, text_k, text_v = _project(encoder_hidden_states, head_dim, *text)
        return torch.cat([q, text_q], dim=1), torch.cat([k, text_k], dim=1), torch.cat([v, text_v], dim=1)

    def output(self, attn, out, encoder_hidden_states):
        video, text = out[:, : self.layout.visual_len], out[:, self.layout.visual_len :]
        if attn.to_out is None:  # single-stream blocks project both themselves
            return video, text
        return attn.to_out[1](attn.to_out[0](video.contiguous())), attn.to_add_out(text.contiguous())


def _project(x: torch.Tensor, head_dim: int, to_q, to_k, to_v, norm_q, norm_k) -> tuple[torch.Tensor, ...]:
    """Normalised q, k and v of one stream (B, S, C), each (B, S, H, D)."""
    q, k, v = (linear(x).unflatten(-1, (-1, head_dim)) for linear in (to_q, to_k, to_v))
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


class HunyuanVideo(Family):
    name = "hunyuan-video"
    transformer = "HunyuanVideoTransformer3DModel"
    originals = ("HunyuanVideoAttnProcessor2_0",)
    processor = HunyuanVideoProcessor

    def layers(self, transformer: nn.Module) -> dict[str, nn.Module]:
        return double_and_single(transformer)

    def blocks(self, transformer: nn.Module) -> tuple[nn.ModuleList, ...]:
        return double_and_single_blocks(transformer)

    def layout(self, transformer: nn.Module, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        shape, patch = inputs["hidden_states"].shape[2:], _patch(transformer)
        grid = tuple(n // p for n, p in zip(shape, patch, strict=True))
        return TokenLayout(grid, text_len=inputs["encoder_hidden_states"].shape[1])

    def text_valid(self, inputs: dict[str, Any], memo: dict) -> torch.Tensor:
        valid = read_once(memo, inputs["encoder_attention_mask"], valid_lengths)
        return valid.to(inputs["hidden_states"].device)

    def leading(self, transformer: nn.Module, layout: TokenLayout) -> int:
        """The first frame, where it is the given image (`"token_replace"`): its modulation is another."""
        replaces = transformer.config.image_condition_type == "token_replace"
        return layout.grid[1] * layout.grid[2] if replaces else 0

    def enter(
        self, transformer: nn.Module, inputs: dict[str, Any], layout: TokenLayout, permute: Permute
    ) -> dict:
        video = move_patches(inputs["hidden_states"], layout.grid, _patch(transformer), permute)
        return inputs | {"hidden_states": video}

    def leave(
        self, transformer: nn.Module, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        return move_patches(sample, layout.grid, _patch(transformer), restore)

    def placed_outputs(self, transformer: nn.Module) -> dict[nn.Module, int]:
        return {transformer.rope: 0}


def _patch(transformer: nn.Module) -> tuple[int, int, int]:
    config = transformer.config
    return config.patch_size_t, config.patch_size, config.patch_size


def valid_lengths(mask: torch.Tensor) -> torch.Tensor:
    """How many text tokens of each sample are valid, int32 (B,), from a mask (B, T) of ones, then zeros.

    Raises:
        ValueError: padding that does not come last.
    """
    valid = mask.sum(dim=1, dtype=torch.int32)
    first = torch.arange(mask.shape[1], device=mask.device) < valid[:, None]
    if not torch.equal(mask, first.to(mask.dtype)):
        raise ValueError(
            "`encoder_attention_mask` must be ones followed by zeros: accelerated layers take padded text by "
            'its length; tokenize with padding_side="right", or `dit_accel.disable` it for such calls'
        )
    return valid


FAMILY = HunyuanVideo()
