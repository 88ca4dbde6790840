"""Baselines: the model as it is at a size that it was not trained for, and windows with nothing global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.patterns import InwardWindow, Pattern

from .method import Job, Method, Pass, Windowed
from .native import Native, Size
from .schedule import Part


@dataclass(frozen=True)
class Direct(Method):
    """One pass at the target size from pure noise, on the pipeline's schedule: what methods improve on."""

    name: ClassVar[str] = "direct"

    def passes(self, job: Job) -> list[Pass]:
        return [Pass(job.target, Part(job.steps))]


@dataclass(frozen=True)
class Upscaled(Method):
    """The native result, enlarged, re-noised and denoised with attention as the model has it."""

    name: ClassVar[str] = "upscaled"


@dataclass(frozen=True)
class Naive(Windowed):
    """The same in windows of the native size, each of which knows nothing of the others.

    Args:
        half_window: (dh, dw), see `dit_accel.patterns.InwardWindow`.
    """

    half_window: tuple[int, int]

    name: ClassVar[str] = "naive"

    @classmethod
    def suited(cls, native: Native, base: Size) -> Method:
        return cls(half_window(native, base))

    def pattern(self) -> Pattern:
        return InwardWindow(self.half_window)


def half_window(native: Native, base: Size) -> tuple[int, int]:
    """Half of the rows and columns of tokens of the native size."""
    _, rows, columns = native.grid(base)
    return rows // 2, columns // 2
