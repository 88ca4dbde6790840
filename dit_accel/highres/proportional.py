"""Proportional attention: scores are scaled up as there are more keys, so that attention stays as focused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_accel.attention.call import AroundAnother, AttentionCall, LayerAttention, ModelAttention
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.errors import UnavailableError
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Dense, Pattern
from dit_accel.pipelines.families import family_of
from dit_accel.recipe.layer_patterns import assign_patterns
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, handle_of, transformers_of


@dataclass(frozen=True, eq=False)
class Rescaled(AroundAnother):
    """What another computes with scores `factor` times as large."""

    inner: LayerAttention
    factor: float

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def model_orders(self) -> list[torch.Tensor]:
        return self.inner.model_orders()

    def _scaled(self, call: AttentionCall) -> AttentionCall:
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        return replace(call, scale=scale * self.factor)

    def resolved(self, call: AttentionCall) -> LayerAttention:
        return replace(self, inner=self.inner.resolved(self._scaled(call)))

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        return self.inner(self._scaled(call))

    def with_lse(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner.with_lse(self._scaled(call))


@dataclass(frozen=True)
class Proportional(Pattern):
    """Patterns of the heads of a layer with scores times sqrt(ln L / ln L_trained), L all keys of the layer.

    Attributes:
        heads: the pattern of each head.
        trained: visual tokens in training; L_trained is with the call's text.
    """

    heads: tuple[Pattern, ...]
    trained: int

    def at_step(self, step: int, sigma: float | None = None, total: int | None = None) -> Pattern:
        return replace(self, heads=tuple(pattern.at_step(step, sigma, total) for pattern in self.heads))

    @property
    def by_noise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(pattern.by_noise for pattern in self.heads)

    @property
    def hides(self) -> bool:
        return any(pattern.hides for pattern in self.heads)

    @property
    def variants(self) -> Sequence[Pattern]:
        """Not all that it is at some step, but whether it is more than one."""
        return (self, self) if any(len(pattern.variants) > 1 for pattern in self.heads) else (self,)

    def token_order(
        self,
        layout: TokenLayout,
        block_size: tuple[int, int] = (128, 64),
        order: str | Sequence[int] | torch.Tensor = "auto",
    ) -> torch.Tensor:
        first = min(self.heads, key=lambda pattern: (not pattern.sparse, pattern.online))
        return first.token_order(layout, block_size, order) if first.sparse else super().token_order(layout)

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
        layout = masks.layout
        trained = self.trained + layout.text_len
        factor = math.sqrt(math.log(max(layout.seq_len, 2)) / math.log(max(trained, 2)))
        sparse = any(pattern.sparse for pattern in self.heads)
        return Rescaled(layer_attention(self.heads, masks) if sparse else ModelAttention(), factor)


@contextmanager
def proportional(target: Any, trained: int) -> Iterator[None]:
    """All layers of a pipeline's transformers attend proportionally, for the length of a `with` block.

    Args:
        trained: visual tokens in training.

    Raises:
        UnavailableError: a recipe with dense steps, in which no layer is ours.
    """
    before = handle_of(target)
    recipe = Recipe(Dense()) if before is None else before.recipe
    if recipe.dense_steps not in (0, (), 0.0):
        raise UnavailableError(
            "proportional attention holds at all steps, and the recipe's "
            f"`dense_steps={recipe.dense_steps!r}` leave some to the model; use dense_steps=0, or "
            "proportional=False"
        )
    transformer = next(iter(transformers_of(target).values()))
    heads = int(transformer.config.num_attention_heads)
    layers = assign_patterns(recipe, list(family_of(transformer).found_layers(transformer)), heads)
    attention: dict[str, Pattern] = {
        layer.name: Proportional(layer.heads or (Dense(),) * heads, trained) for layer in layers
    }
    numerics = {"dense_layers": 0, "min_tokens": 0, "name": "", "source": ""}
    with accelerated(target, replace(recipe, attention=attention, **numerics)):
        yield
