"""What stands in for a pipeline's transformers and makes its own calls of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dit_accel.recipe.adapter import TRANSFORMERS


class StandIn:
    """Answers for a transformer, whose calls it predicts in its own way."""

    def __init__(self, transformer: Any):
        self._transformer = transformer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transformer, name)

    def predict(self, **inputs: Any) -> torch.Tensor:
        """The prediction of a call with these inputs of the transformer's forward."""
        raise NotImplementedError

    def inner(self, **inputs: Any) -> torch.Tensor:
        """What the transformer itself predicts."""
        return self._transformer(**inputs, return_dict=False)[0]

    def __call__(self, **inputs: Any) -> Any:
        returns_dict = inputs.pop("return_dict", True)
        sample = self.predict(**inputs)
        if not returns_dict:
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)


@contextmanager
def standing_in(pipe: Any, make: Callable[[Any], StandIn]) -> Iterator[None]:
    """All transformers of a pipeline are stood in for, for the length of a `with` block.

    Recipes are enabled and methods applied before.
    """
    found = {name: getattr(pipe, name, None) for name in TRANSFORMERS}
    found = {name: transformer for name, transformer in found.items() if transformer is not None}
    for name, transformer in found.items():
        object.__setattr__(pipe, name, make(transformer))
    try:
        yield
    finally:
        for name, transformer in found.items():
            object.__setattr__(pipe, name, transformer)
