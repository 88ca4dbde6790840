"""Joint attention over visual tokens, then text, for families whose diffusers processors cannot be reused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dit_accel.attention import transformer_call
from dit_accel.attention.call import AttentionCall, ModelAttention

from .processors import Accelerated


class PlainProcessor(Accelerated):
    """Attends by PyTorch's function in layers that stay dense."""

    def models_own(self) -> bool:
        """Whether the layer is dense in this call, as far as can be told outside of compiled code."""
        if torch.compiler.is_compiling():
            return False
        call = transformer_call.current(self.owner)
        own = call is not None and isinstance(call.attention(self.layer), ModelAttention)
        return own and call.shards_of(self.layer) is None  # the original knows of no other process

    def dense(self, call: AttentionCall, attn_mask: torch.Tensor | None) -> torch.Tensor:
        hidden = call.hidden_keys()
        mask = None if hidden is None else ~hidden[:, None, None]
        return F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=mask, scale=call.scale)


class JointProcessor(PlainProcessor):
    """Projects, normalises and rotates as diffusers does, through the layer's own modules.

    Attributes:
        fused: whether q, k and v come from one projection (`fuse_qkv_projections`).
    """

    fused = False

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        if self.owner is None:
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=image_rotary_emb
            )
        visual, text = hidden_states, encoder_hidden_states
        q, k, v = self._projected(attn, visual, ("to_q", "to_k", "to_v"), "to_qkv")
        q, k = _norm(attn.norm_q, q), _norm(attn.norm_k, k)
        if image_rotary_emb is not None:
            q, k = self.rotated(q, image_rotary_emb), self.rotated(k, image_rotary_emb)
        if text is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            text_q, text_k, text_v = self._projected(attn, text, names, "to_added_qkv")
            q = torch.cat([q, _norm(attn.norm_added_q, text_q)], dim=1)
            k = torch.cat([k, _norm(attn.norm_added_k, text_k)], dim=1)
            v = torch.cat([v, text_v], dim=1)
        out = self.attend(q, k, v).flatten(2).to(q.dtype)
        length = visual.shape[1]
        visual = attn.to_out[1](attn.to_out[0](out[:, :length].contiguous()))
        if text is None:
            return visual
        text = out[:, length:].contiguous()
        to_add_out = getattr(attn, "to_add_out", None)
        return visual, text if to_add_out is None else to_add_out(text)

    def rotated(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> Any:
        """Queries or keys of the visual tokens (B, S, H, D) with the rotary embedding."""
        from diffusers.models.embeddings import apply_rotary_emb

        return apply_rotary_emb(x, rotary, sequence_dim=1)

    def _projected(self, attn: nn.Module, x: torch.Tensor, names: tuple[str, ...], fused: str):
        """q, k and v of one stream (B, S, C), each (B, S, H, D)."""
        if self.fused:
            parts = getattr(attn, fused)(x).chunk(3, dim=-1)
        else:
            parts = [getattr(attn, name)(x) for name in names]
        return [part.unflatten(-1, (attn.heads, -1)) for part in parts]


def _norm(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)
