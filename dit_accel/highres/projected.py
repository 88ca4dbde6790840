"""I-Max: each step's flow is projected to the flow towards the native result, less and less."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from dit_accel.arguments import integer, shown

from .extrapolation import Rotary
from .low_pass import haar
from .method import Before, Job, Method, Pass
from .schedule import OnStep, Part

SCHEDULES = ("cosine_decay", "cosine_shift", "constant")


@dataclass(frozen=True)
class Projected(Method):
    """All steps from pure noise, guided by the native result; NTK positions, clipped; proportional attention.

    With fp = (x - ref) / t the flow towards the enlarged native result, low its Haar approximation and c =
    (1 + cos(pi i / N)) / 2 at step i of N, the prediction v becomes

        cosine_decay   v + c (low(fp) - low(v))
        cosine_shift   v + c (fp - v) + (1 - c) (low(fp) - low(v))
        constant       v + low(fp) - low(v)

    Published for FLUX with shift 6 and guidance 7 (native pass 3 and 3.5). Strength has no meaning here.

    Args:
        schedule: one of these; `"cosine_shift"` is the released code's.
        level: of the Haar approximation, from 1.

    Source: Du et al., "I-Max: Maximize the Resolution Potential of Pre-trained Rectified Flow Transformers
    with Projected Flow", 2024, and its released code.
    """

    schedule: str = "cosine_shift"
    level: int = 1

    name: ClassVar[str] = "projected"
    rotary: ClassVar[Rotary | None] = Rotary("ntk", factor=10, clip=True)
    proportional: ClassVar[bool] = True
    enlarging: ClassVar[str] = "bicubic"

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {', '.join(SCHEDULES)}, got {shown(self.schedule)}")
        object.__setattr__(self, "level", integer("level", self.level, 1))

    def passes(self, job: Job) -> list[Pass]:
        above = Part(job.steps, shift=job.shift)
        return [Pass(job.base, Part(job.steps), above_native=False), Pass(job.target, above)]

    def on_step(self, before: Before, part: Part) -> OnStep:
        reference = before.reference

        def project(v: torch.Tensor, x: torch.Tensor, level: float, step: int, steps: int) -> torch.Tensor:
            towards = (x - reference) / (level + 1e-6)
            low = haar(towards, self.level) - haar(v, self.level)
            if self.schedule == "constant":
                return v + low
            c = (1 + math.cos(math.pi * step / steps)) / 2
            if self.schedule == "cosine_decay":
                return v + c * low
            return v + c * (towards - v) + (1 - c) * low

        return project
