"""RectifiedHR: one run whose picture grows while it is still noisy, the cheapest of all methods."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from dit_accel.arguments import integer

from .method import Job, Method, Pass
from .native import Size
from .schedule import Part


@dataclass(frozen=True)
class Growing(Method):
    """Steps at growing sizes from native to target; in between, the clean estimate is enlarged and re-noised.

    One schedule, the pipeline's own at native size, is run once in all: its first steps at native size, as
    many as `strength` leaves, the others shared evenly among the larger sizes. Published for Wan 1.3B: one
    enlargement after 30 of 50 steps (strength 0.4), guidance 5, then 10.

    Args:
        enlargements: how many, from 1; sizes grow linearly.

    Source: Yang et al., "RectifiedHR: Enable Efficient High-Resolution Image Generation via Energy
    Rectification", 2025.
    """

    enlargements: int = 1

    name: ClassVar[str] = "growing"

    def __post_init__(self):
        object.__setattr__(self, "enlargements", integer("enlargements", self.enlargements, 1))

    def passes(self, job: Job) -> list[Pass]:
        n, rest = self.enlargements, job.steps - job.first
        if job.first < 1 or rest < n:
            raise ValueError(
                f"`strength` must leave steps at native size and {n} or more above it, got {job.first} and "
                f"{rest} of {job.steps}"
            )
        cuts = [0, *(job.first + round(rest * i / n) for i in range(n)), job.steps]
        found = []
        for i, (first, last) in enumerate(pairwise(cuts)):
            width, height = (
                round((a + (b - a) * i / n) / pixels) * pixels
                for a, b, pixels in zip(
                    (job.base.width, job.base.height),
                    (job.target.width, job.target.height),
                    job.native.pixels[::-1],
                    strict=True,
                )
            )
            part = Part(job.steps, first, last, job.native_shift)
            found.append(Pass(Size(width, height, job.target.frames), part, above_native=i > 0))
        return found
