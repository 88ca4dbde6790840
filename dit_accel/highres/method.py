"""What a high-resolution method is: its passes, and what it changes in those above native size."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from dit_accel.patterns import Dense, Pattern
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, handle_of

from .extrapolation import Rotary
from .native import Native, Size
from .schedule import OnStep, Part


@dataclass(frozen=True)
class Job:
    """What is to be made.

    Attributes:
        native: what the model was trained for.
        base, target: sizes of the native pass and of the result.
        steps: of a whole schedule.
        first: of the steps of a pass above native size, as strength says.
        shift: of the schedule of passes above native size.
        native_shift: of the pipeline's own schedule at native size.
    """

    native: Native
    base: Size
    target: Size
    steps: int
    first: int
    shift: float
    native_shift: float


@dataclass(frozen=True)
class Pass:
    """One run of the pipeline. All but the first begin from the enlarged result of the one before."""

    size: Size
    part: Part
    above_native: bool = True


@dataclass
class Before:
    """What a pass may take from those before it.

    Attributes:
        reference: latents of the enlarged result, fp32 (B, C, [F,] H, W).
        estimates: clean estimates of the pass before, at each of its steps; empty where none are needed.
    """

    reference: torch.Tensor
    estimates: list[torch.Tensor]


class Method:
    """Base of all methods: frozen dataclasses whose fields are their options.

    Attributes:
        name: by which `dit_accel.highres.generate` knows it.
        keeps_estimates: whether a pass needs the clean estimates of the one before.
        rotary, proportional: what is taken above native size where nothing is asked for.
        scales: whether it has a scale of attention of its own.
        enlarging, sharpens: how results are enlarged between passes.
    """

    name: ClassVar[str]
    keeps_estimates: ClassVar[bool] = False
    rotary: ClassVar[Rotary | None] = None
    proportional: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    enlarging: ClassVar[str] = "bilinear"
    sharpens: ClassVar[bool] = False

    @classmethod
    def suited(cls, native: Native, base: Size) -> Method:
        """The method with its options as they suit a model and the size of its native pass."""
        return cls()

    def passes(self, job: Job) -> list[Pass]:
        """The runs of the pipeline: as a rule the native one, then one at the target, re-noised."""
        above = Part(job.steps, job.first, shift=job.shift)
        return [Pass(job.base, Part(job.steps), above_native=False), Pass(job.target, above)]

    def applied(self, target: Any) -> AbstractContextManager[Any]:
        """What is on in passes above native size, for the length of a `with` block."""
        return nullcontext()

    def on_step(self, before: Before, part: Part) -> OnStep | None:
        """What it makes of each prediction of a pass above native size; None: it stays."""
        return None


class Windowed(Method):
    """A method whose passes above native size attend under one pattern.

    Quantization, tail and kernel are those of what is enabled on the pipeline, whose own patterns then hold
    in the native pass alone.
    """

    def pattern(self) -> Pattern:
        """What every layer attends to."""
        raise NotImplementedError

    def applied(self, target: Any) -> AbstractContextManager[Any]:
        before = handle_of(target)
        recipe = Recipe(Dense()) if before is None else before.recipe
        numerics = {"dense_layers": 0, "dense_steps": 0, "min_tokens": 0, "name": "", "source": ""}
        return accelerated(target, replace(recipe, attention=self.pattern(), **numerics))
