"""FreeSwim: sliding windows for pictures and videos larger than the model was trained for, without training.

Each token attends to a window of the native size, so that detail is drawn as in training, and takes its text
from a second branch that attends to everything, so that there is one scene and not one in every window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from dit_accel.arguments import integer, integers, is_number, shown
from dit_accel.errors import UnavailableError
from dit_accel.patterns import Dense, InwardWindow
from dit_accel.runtime.dual_paths import DualPaths
from dit_accel.runtime.switching import accelerated

from .branches import Branches
from .direct import half_window
from .method import Job, Method, Pass, Work
from .native import Native, Size, check_supported
from .wrapping import enabled, in_all_layers

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

    def work(self, job: Job, one: Pass) -> Work:
        window, full = InwardWindow(self.half_window), Dense()
        if self.cache_steps is None:
            return Work(((window, 1, 1), (full, 1, 1)), together=(2, 2))
        guided = -(-one.part.count // self.cache_steps) / one.part.count
        return Work(((window, 1, 1), (full, guided, 0)), together=(2, 1), keeps=True)

    @contextmanager
    def applied(self, target: Any) -> Iterator[Any]:
        """Lets a transformer, or a pipeline's, predict by its window branch for the length of a `with` block.

        Both branches start from the latents of a call, and it returns the window branch's prediction. What is
        enabled on the target is the full branch's recipe, and comes back after the block.

        Yields:
            The handle, as of `dit_accel.enable`.

        Raises:
            TypeError: a transformer of no known family.
            UnavailableError: a recipe with guidance, a family without runs above native size, or what
                `dit_accel.enable` refuses.
        """
        full = enabled(target)
        if full.guidance is not None:
            raise UnavailableError(
                "the dual path has two branches already, and `Recipe(guidance=...)` would add a third; use "
                "guidance=None"
            )
        window = InwardWindow(self.half_window)
        recipe = in_all_layers(target, full, lambda heads: Branches(window, heads))
        with accelerated(target, recipe) as handle:
            for binding in handle.bindings.values():
                check_supported(binding.family)
            paths = [DualPaths(b, full, self.cache_steps, self.scale) for b in handle.bindings.values()]
            try:
                for binding, own in zip(handle.bindings.values(), paths, strict=True):
                    binding.paths = own
                    own.attach()
                yield handle
            finally:
                for own in paths:
                    own.detach()
