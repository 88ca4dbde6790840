"""Patterns made of others, and a recipe whose layers have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dit_accel.patterns import Dense, Pattern
from dit_accel.pipelines.families import family_of
from dit_accel.recipe.layer_patterns import assign_patterns
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import handle_of, transformers_of

# fields of a recipe that methods set, whatever is enabled
METHODS_OWN: dict[str, Any] = {"dense_layers": 0, "dense_steps": 0, "min_tokens": 0, "name": "", "source": ""}


class Wrapping(Pattern):
    """A pattern of every head of a layer that is made of others."""

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The others."""
        raise NotImplementedError

    def of_parts(self, change: Callable[[Pattern], Pattern]) -> Pattern:
        """The same of changed ones."""
        raise NotImplementedError

    def at_step(self, step: int, sigma: float | None = None, total: int | None = None) -> Pattern:
        return self.of_parts(lambda pattern: pattern.at_step(step, sigma, total))

    @property
    def hides(self) -> bool:
        return any(pattern.hides for pattern in self.parts)

    @property
    def by_noise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(pattern.by_noise for pattern in self.parts)

    @property
    def variants(self) -> Sequence[Pattern]:
        """Not all that it is at some step, but whether it is more than one."""
        return (self, self) if any(len(pattern.variants) > 1 for pattern in self.parts) else (self,)


def enabled(target: Any) -> Recipe:
    """The recipe that is enabled on a pipeline or transformer, a dense one where none is."""
    before = handle_of(target)
    return Recipe(Dense()) if before is None else before.recipe


def in_all_layers(
    target: Any, recipe: Recipe, make: Callable[[tuple[Pattern, ...]], Pattern], **changes: Any
) -> Recipe:
    """A recipe in every layer of a pipeline's transformers, with the patterns that `make` makes of its own.

    Args:
        make: from the pattern of each head of a layer.
        changes: other fields of the recipe.
    """
    transformer = next(iter(transformers_of(target).values()))
    heads = family_of(transformer).heads(transformer)[0]
    layers = assign_patterns(recipe, list(family_of(transformer).found_layers(transformer)), heads)
    attention = {layer.name: make(layer.heads or (Dense(),) * heads) for layer in layers}
    return replace(recipe, attention=attention, **{**METHODS_OWN, **changes})
