"""The perturbed model alone, without guidance around it: what `HeadPerturbation.applied` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from dit_accel.patterns import Dense
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, handle_of

from .perturbation import HeadPerturbation, applied_by


@applied_by
@contextmanager
def perturbed_model(perturbation: HeadPerturbation, target: Any) -> Iterator[None]:
    """Perturbs every call of a transformer (or a pipeline's) for the length of a `with` block.

    Raises:
        ValueError, UnavailableError, TypeError: see `dit_accel.enable`.
    """
    before = handle_of(target)
    recipe = Recipe(Dense()) if before is None else before.recipe
    with accelerated(target, replace(recipe, guidance=perturbation)) as handle:
        for binding in handle.bindings.values():
            binding.branch.alone = True
            for earlier in () if before is None else before.bindings.values():
                if earlier.transformer is binding.transformer:
                    binding.adopt(earlier)
        yield
