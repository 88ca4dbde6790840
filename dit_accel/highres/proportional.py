"""Proportional attention: scores are scaled up as there are more keys, so that attention stays as focused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_accel.attention.call import AroundAnother, AttentionCall, LayerAttention, ModelAttention
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.errors import UnavailableError
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Pattern
from dit_accel.runtime.switching import accelerated

from .wrapping import Wrapping, enabled, in_all_layers


@dataclass(frozen=True, eq=False)
class Rescaled(AroundAnother):
    """What another computes with scores `factor` times as large."""

    inner: LayerAttention
    factor: float

    def _scaled(self, call: AttentionCall) -> AttentionCall:
        return replace(call, scale=call.factor * self.factor)

    def resolved(self, call: AttentionCall) -> LayerAttention:
        return replace(self, inner=self.inner.resolved(self._scaled(call)))

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        return self.inner(self._scaled(call))

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner.with_lse(self._scaled(call))


@dataclass(frozen=True)
class OfHeads(Wrapping):
    """Patterns of the heads of a layer, with something around what they compute.

    Attributes:
        heads: the pattern of each head.
    """

    heads: tuple[Pattern, ...]

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return self.heads

    def of_parts(self, change: Callable[[Pattern], Pattern]) -> Pattern:
        return replace(self, heads=tuple(map(change, self.heads)))

    def token_order(
        self,
        layout: TokenLayout,
        block_size: tuple[int, int] = (128, 64),
        order: str | Sequence[int] | torch.Tensor = "auto",
    ) -> torch.Tensor:
        first = min(self.heads, key=lambda pattern: (not pattern.sparse, pattern.online))
        return first.token_order(layout, block_size, order) if first.sparse else super().token_order(layout)

    def inner(self, masks: LayerMasks) -> LayerAttention:
        """What the heads compute."""
        sparse = any(pattern.sparse for pattern in self.heads)
        return layer_attention(self.heads, masks) if sparse else ModelAttention()


@dataclass(frozen=True)
class Proportional(OfHeads):
    """With scores times sqrt(ln L / ln L_trained), L all keys of the layer.

    Attributes:
        trained: visual tokens in training; L_trained is with the call's text.
    """

    trained: int = 1

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
        layout = masks.layout
        trained = self.trained + layout.text_len
        factor = math.sqrt(math.log(max(layout.seq_len, 2)) / math.log(max(trained, 2)))
        return Rescaled(self.inner(masks), factor)


@contextmanager
def proportional(target: Any, trained: int) -> Iterator[None]:
    """All layers of a pipeline's transformers attend proportionally, for the length of a `with` block.

    Args:
        trained: visual tokens in training.

    Raises:
        UnavailableError: a recipe with dense steps, in which no layer is ours.
    """
    recipe = enabled(target)
    if recipe.dense_steps not in (0, (), 0.0):
        raise UnavailableError(
            "proportional attention holds at all steps, and the recipe's "
            f"`dense_steps={recipe.dense_steps!r}` leave some to the model; use dense_steps=0, or "
            "proportional=False"
        )
    with accelerated(target, in_all_layers(target, recipe, lambda heads: Proportional(heads, trained))):
        yield
