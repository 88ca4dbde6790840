"""UltraGen's division of work: windows for detail, and what is outside of them by the means of its blocks."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from dit_accel.arguments import integers
from dit_accel.patterns import LocalGlobal, Pattern
from dit_accel.runtime.switching import accelerated

from .method import Job, Method, Pass, Work
from .native import Native, Size
from .wrapping import enabled, in_all_layers


@dataclass(frozen=True)
class Tiles(LocalGlobal):
    """Windows side by side; a tail may bring back what is outside of them, as there is no anchor."""

    hides = False  # pyright: ignore[reportAssignmentType]


@dataclass(frozen=True)
class Compressed(Method):
    """Windows of the native size side by side; keys outside of them by means of blocks, in the same softmax.

    Windows of every other layer are moved by half a window, so that none has a border in all layers. Blocks
    outside of a window contribute their mean key and value, weighted by their number of tokens: the pooled
    tail of `dit_accel.Recipe`. In UltraGen a learned convolution compresses, layers are trained,
    and both results are added; its weights are not published: this is its division of work, without them.

    Args:
        window: (rows, columns) of tokens of a window, in all frames.

    Source: after Hu et al., "UltraGen: High-Resolution Video Generation with Hierarchical Attention", 2025.
    """

    window: tuple[int, int]

    name: ClassVar[str] = "compressed"

    def __post_init__(self):
        object.__setattr__(self, "window", integers("window", self.window, "(rows, columns)", 1))

    @classmethod
    def suited(cls, native: Native, base: Size) -> Method:
        return cls(native.grid(base)[1:])

    def pattern(self, layer: int = 0) -> Pattern:
        """What a layer attends to, by its place among all."""
        rows, columns = self.window
        return Tiles(self.window, (rows // 2, columns // 2) if layer % 2 else (0, 0))

    def work(self, job: Job, one: Pass) -> Work:
        return Work(((self.pattern(), 1, 1),))

    def applied(self, target: Any) -> AbstractContextManager[Any]:
        places = itertools.count()
        recipe = in_all_layers(
            target, enabled(target), lambda heads: self.pattern(next(places)), tail="pooled"
        )
        return accelerated(target, recipe)
