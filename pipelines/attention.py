"""What all families share: how a family is described, and the attention processor of an accelerated layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dit_accel.blockmask import BlockMask
from dit_accel.kernels import block_sparse_attention
from dit_accel.layout import TokenLayout

DENSE = "dense"
Permute = Callable[
    [torch.Tensor, int], torch.Tensor
]  # (tensor, dimension of the visual tokens) -> same, reordered


class SparseProcessor:
    """Attention processor of one layer: block-sparse, or the layer's original processor at dense steps.

    A family fills in `project` and `output`. `route` says what this forward does: a `BlockMask`, `DENSE`, or
    None between forwards. Projections go through the layer's own modules, so LoRA and quantized weights take
    part. Everything stays in *kernel order*: visual tokens (already permuted where they entered the
    transformer), then text.
    """

    def __init__(self, original: Any, backend: str = "auto"):
        self.original = original
        self.backend = backend
        self.route: BlockMask | str | None = None
        self.layout: TokenLayout | None = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        if self.route is None:
            raise RuntimeError(
                "an accelerated attention layer was called outside its transformer's call; call the "
                "transformer itself (not its `forward` or its blocks), or `dit_accel.disable` it first"
            )
        if isinstance(self.route, str):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if attention_mask is not None:
            raise ValueError(
                "an `attention_mask` is not supported in accelerated layers; make this layer or step dense"
            )
        if self._parallel_config is not None:
            raise ValueError(
                "context parallelism is not supported in accelerated layers; `dit_accel.disable` it first"
            )
        q, k, v = self.project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        out = block_sparse_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.route, backend=self.backend
        )
        return self.output(attn, out.transpose(1, 2).flatten(2), encoder_hidden_states)

    def project(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v in kernel order with norms and rotary embedding applied, each (B, S, H, D)."""
        raise NotImplementedError

    def output(self, attn: nn.Module, out: torch.Tensor, encoder_hidden_states: torch.Tensor | None):
        """What the layer's block expects, from the attention's output (B, S, H * D) in kernel order."""
        raise NotImplementedError

    # `set_attention_backend` and context parallelism write these on whatever processor a layer has.

    @property
    def _attention_backend(self):
        return getattr(self.original, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, value):
        self.original._attention_backend = value

    @property
    def _parallel_config(self):
        return getattr(self.original, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, value):
        self.original._parallel_config = value


class Family:
    """What only this model family knows. One instance per family, without state.

    Attributes:
        name: as in presets and selectors' documentation.
        transformer: class name of the transformers it describes.
        originals: class names of the attention processors that `processor` can stand in for.
        processor: its `SparseProcessor`.
    """

    name: str
    transformer: str
    originals: tuple[str, ...]
    processor: type[SparseProcessor]

    def matches(self, transformer: nn.Module) -> bool:
        return any(cls.__name__ == self.transformer for cls in type(transformer).__mro__)

    def layers(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """Attention modules by layer name, in flat order."""
        raise NotImplementedError

    def layout(self, transformer: nn.Module, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        """The geometry of a call, from the inputs of the transformer's forward.

        `memo` keeps what is costly to read until the next call.

        Raises:
            ValueError: tokens that are not one full grid.
        """
        raise NotImplementedError

    def enter(
        self, transformer: nn.Module, inputs: dict[str, Any], layout: TokenLayout, permute: Permute
    ) -> dict:
        """The inputs with everything that has a place per visual token permuted."""
        raise NotImplementedError

    def leave(
        self, transformer: nn.Module, sample: torch.Tensor, layout: TokenLayout, restore: Permute
    ) -> torch.Tensor:
        """The transformer's output back in its own order."""
        raise NotImplementedError

    def rotary(self, transformer: nn.Module) -> nn.Module | None:
        """The module whose outputs, a tuple of tensors (1, S, ...), must be permuted as well, or None."""
        return None


def project_qkv(attn: nn.Module, hidden_states: torch.Tensor) -> list[torch.Tensor]:
    """q, k, v of self-attention, each (B, S, H * D), through fused projections where the layer has them."""
    if attn.fused_projections:
        return list(attn.to_qkv(hidden_states).chunk(3, dim=-1))
    return [attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)]
