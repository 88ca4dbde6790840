"""What a high-resolution method is: its passes, and what it changes in those above native size."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from dit_accel.arguments import is_number, shown
from dit_accel.patterns import Dense, Pattern
from dit_accel.runtime.switching import accelerated

from .extrapolation import Rotary
from .native import Native, Size
from .schedule import OnStep, Part
from .wrapping import METHODS_OWN, enabled


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
    shift: float = 1.0
    native_shift: float = 1.0

    @classmethod
    def checked(cls, native: Native, target: Size, steps: int, strength: Any) -> Job:
        """A job whose last `strength` of the steps run above native size; the shifts are not set.

        Raises:
            ValueError: a strength that cannot be or leaves no step, or a target below the native area.
        """
        if not is_number(strength) or not 0 < strength <= 1:
            raise ValueError(f"`strength` must be above 0 and at most 1, got {shown(strength)}")
        count = int(steps * strength + 1e-9)
        if count < 1:
            raise ValueError(
                f"`strength` of {strength} leaves none of {steps} steps above native size; give more of "
                "either"
            )
        base = native.of_aspect(target)
        if target.width * target.height < base.width * base.height:
            raise ValueError(
                f"`width` and `height` must be of at least the native area, {native.size}, got {target}; "
                "call the pipeline itself for smaller sizes"
            )
        return cls(native, base, target, steps, steps - count)


@dataclass(frozen=True)
class Pass:
    """One run of the pipeline. All but the first begin from the enlarged result of the one before."""

    size: Size
    part: Part
    above_native: bool = True


@dataclass(frozen=True)
class Work:
    """What a step of a pass above native size computes, for plans.

    Attributes:
        calls: patterns, and how many conditional and unconditional calls of the transformer a mean step makes
            under each, for one sample.
        together: conditional and unconditional samples that one of the pipeline is in a call, at most.
        keeps: whether an output of each layer is kept from step to step.
        size: of each call; None: that of the pass.
    """

    calls: tuple[tuple[Pattern, float, float], ...]
    together: tuple[int, int] = (1, 1)
    keeps: bool = False
    size: Size | None = None


@dataclass
class Before:
    """What a pass may take from those before it.

    Attributes:
        reference: latents of the enlarged result, fp32 (B, C, [F,] H, W).
        estimates: clean estimates of the pass before, at each of its steps; empty where none are needed.
        frames: the result before it was enlarged, (B, F, 3, H, W) in [0, 1], on the CPU.
        watched: what `Method.watching` took down in the native pass.
    """

    reference: torch.Tensor
    estimates: list[torch.Tensor]
    frames: torch.Tensor
    watched: list[torch.Tensor]


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

    def work(self, job: Job, one: Pass) -> Work:
        """What a step of a pass above native size computes."""
        return Work(((Dense(), 1, 1),))

    def check(self, pipe: Any, job: Job) -> None:
        """Refuses, before any work, what it cannot do.

        Raises:
            UnavailableError: such a model.
        """

    @property
    def watches(self) -> bool:
        """Whether it takes something down in the native pass."""
        return False

    def watching(self, pipe: Any, watched: list[torch.Tensor]) -> AbstractContextManager[Any]:
        """Takes it down into `watched`, for the length of the native pass."""
        return nullcontext()

    def around(
        self, pipe: Any, before: Before, job: Job, call: dict[str, Any]
    ) -> AbstractContextManager[Any]:
        """What stands in for the transformers in a pass above native size, for the length of a `with` block.

        Args:
            call: arguments of the pipeline's call.
        """
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

    def work(self, job: Job, one: Pass) -> Work:
        return Work(((self.pattern(), 1, 1),))

    def applied(self, target: Any) -> AbstractContextManager[Any]:
        return accelerated(target, replace(enabled(target), attention=self.pattern(), **METHODS_OWN))
