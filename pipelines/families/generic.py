"""Transformers of no known family, of which the caller says how their tokens are laid out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dit_accel.errors import UnavailableError
from dit_accel.masks.layout import TokenLayout

from .base import Family
from .processors import DISPATCH, not_reusable
from .refused import why_refused

Layout = TokenLayout | Callable[[dict[str, Any]], TokenLayout]


class Generic(Family):
    """A transformer whose attention processors call diffusers' `dispatch_attention_fn`.

    Tokens stay in the model's order outside of its attention layers, which move them themselves. Layers
    under these names that attend to another number of tokens than the layout has keep the model's own.

    Args:
        layout: of every call, or a function of a call's inputs by name.

    Raises:
        TypeError: a layout that is neither.
    """

    name = "of no known family"
    moves_tokens = False
    pure_noise = None
    distillation_refusal = "what their timesteps mean is not known"

    def __init__(self, layout: Layout):
        if not isinstance(layout, TokenLayout) and not callable(layout):
            raise TypeError(
                "`layout` must be a TokenLayout or a function from a call's inputs to one, got "
                f"{type(layout).__name__}"
            )
        self._layout = layout

    def layers(self, transformer: Any) -> dict[str, nn.Module]:
        if reason := why_refused(transformer):
            raise UnavailableError(f"{type(transformer).__name__} is not supported: {reason}")
        found = [
            module
            for module in transformer.modules()
            if hasattr(module, "processor")
            and hasattr(module, "set_processor")
            and not_reusable(type(module.processor)) is None
        ]
        if not found:
            raise UnavailableError(
                f"no attention layer of this {type(transformer).__name__} calls diffusers' `{DISPATCH}`, "
                "where accelerated attention takes over; call `dit_accel.attention` in processors of your own"
            )
        return {f"layers.{i}": module for i, module in enumerate(found)}

    def blocks(self, transformer: Any) -> tuple[nn.ModuleList, ...]:
        raise UnavailableError(
            f"guidance needs to know the blocks of a transformer, and {type(transformer).__name__} is of no "
            "known family; use guidance=None"
        )

    def layout(self, transformer: Any, inputs: dict[str, Any], memo: dict) -> TokenLayout:
        layout = self._layout
        return layout if isinstance(layout, TokenLayout) else layout(inputs)

    def refusal(self, module: nn.Module) -> str | None:
        return None
