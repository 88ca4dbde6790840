"""FreeSwim: sliding windows for pictures and videos larger than the model was trained for, without training.

Each token attends to a window of the native size, so that detail is drawn as in training, and takes its text
from a second branch that attends to everything, so that there is one scene and not one in every window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from dit_accel.arguments import integer, integers, is_number, shown
from dit_accel.errors import UnavailableError
from dit_accel.patterns import Dense, InwardWindow, Pattern
from dit_accel.pipelines.families import family_of
from dit_accel.recipe.layer_patterns import assign_patterns
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.dual_paths import DualPaths
from dit_accel.runtime.switching import accelerated, handle_of, transformers_of

from .branches import Branches
from .direct import half_window
from .method import Method
from .native import Native, Size

_BASE = 1560  # published, of Wan's tokens in a frame


@dataclass(frozen=True)
class Swim(Method):
    """The dual path of FreeSwim on a transformer, by `applied`.

    Args:
        half_window: (dh, dw), rows and columns of tokens on each side of a query that it attends to, in all
            frames (`dit_accel.patterns.InwardWindow`); half of what the model was trained for: of Wan at 480
            x 832 pixels (15, 26).
        cache_steps: on executed steps 0, `cache_steps`, 2 `cache_steps`, ... both branches of the conditional
            samples run and what the full one reads from the text is kept; all else runs in windows alone.
            Published: 2, and 5 for more speed. None: both branches of all samples run at every step.
        scale_log_base: n0 in the scale of attention among visual tokens, sqrt(ln(2 n0) / ln(n0) / head_dim),
            published as 1560, Wan's tokens of a frame; None: the model's own scale.

    Raises:
        ValueError: values outside of these forms.

    Source: Wu et al., "FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free
    Ultra-High-Resolution Video Generation", 2025. For joint attention see `dit_accel.attention.dual_path`.
    """

    half_window: tuple[int, int]
    cache_steps: int | None = None
    scale_log_base: float | None = _BASE

    name: ClassVar[str] = "swim"
    scales: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "half_window", integers("half_window", self.half_window, "(dh, dw)", 0))
        if self.cache_steps is not None:
            object.__setattr__(self, "cache_steps", integer("cache_steps", self.cache_steps, 1))
        base = self.scale_log_base
        if base is not None and (not is_number(base) or base <= 1):
            raise ValueError(f"`scale_log_base` must be a number above 1 or None, got {shown(base)}")

    @classmethod
    def suited(cls, native: Native, base: Size) -> Method:
        """As published for Wan; of other families with the tokens of a native frame in the scale."""
        published = native.family.name == "wan" and not native.bundled
        tokens = native.tokens(Size(native.size.width, native.size.height))
        return cls(half_window(native, base), 2, _BASE if published else tokens)

    @property
    def scale(self) -> float:
        """What the scale of attention among visual tokens is multiplied by."""
        base = self.scale_log_base
        return 1.0 if base is None else math.sqrt(math.log(2 * base) / math.log(base))

    @contextmanager
    def applied(self, target: Any) -> Iterator[Any]:
        """Lets a transformer, or a pipeline's, predict by its window branch for the length of a `with` block.

        Both branches start from the latents of a call, and it returns the window branch's prediction. What is
        enabled on the target is the full branch's recipe, and comes back after the block.

        Yields:
            The handle, as of `dit_accel.enable`.

        Raises:
            TypeError: a transformer of no known family.
            UnavailableError: a recipe with guidance, or what `dit_accel.enable` refuses.
        """
        before = handle_of(target)
        full = Recipe(Dense()) if before is None else before.recipe
        if full.guidance is not None:
            raise UnavailableError(
                "the dual path has two branches already, and `Recipe(guidance=...)` would add a third; use "
                "guidance=None"
            )
        transformer = next(iter(transformers_of(target).values()))
        with accelerated(target, self._recipe(full, transformer)) as handle:
            paths = [DualPaths(b, full, self.cache_steps, self.scale) for b in handle.bindings.values()]
            try:
                for binding, own in zip(handle.bindings.values(), paths, strict=True):
                    binding.paths = own
                    own.attach()
                yield handle
            finally:
                for own in paths:
                    own.detach()

    def _recipe(self, full: Recipe, transformer: nn.Module) -> Recipe:
        """The recipe of both branches: windows, with the numerics of the full branch's recipe."""
        layers = list(family_of(transformer).found_layers(transformer))
        heads = int(transformer.config.num_attention_heads)
        window = InwardWindow(self.half_window)
        attention: dict[str, Pattern] = {}
        for layer in assign_patterns(full, layers, heads):
            attention[layer.name] = Branches(window, layer.heads or (Dense(),) * heads)
        numerics = {"dense_layers": 0, "dense_steps": 0, "min_tokens": 0, "name": "", "source": ""}
        return replace(full, attention=attention, **numerics)
