"""HiFlow: the steps above native size follow those of the native pass, in direction and in acceleration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from dit_accel.arguments import positive

from .extrapolation import Rotary
from .low_pass import butterworth
from .method import Before, Job, Method, Pass
from .schedule import OnStep, Part


@dataclass(frozen=True)
class Flow(Method):
    """Guided by the clean estimates of the native pass at the same noise levels.

    With x0 = x - t v, ref the native pass's x0 at this level, enlarged, and a weight that falls from 1 to 0,
    w = (M - i) / M at step i of M:

        direction      x0 + alpha w (low(ref) - low(x0)), from which v again
        acceleration   v + beta w (v_before + v_ref - v_ref_before - v), from the second step on

    where v_ref = (x - ref) / t. Both passes run on the pipeline's own noise levels at native size. Published
    for FLUX with guidance 4.5 (native pass 3.5), 16 of 30 steps and alpha 1; for a second enlargement 6, 10
    and 0.25.

    Args:
        alpha, beta: weights of direction and acceleration, above 0.
        ratio: of the Butterworth filter.

    Source: Bu et al., "HiFlow: Training-free High-Resolution Image Generation with Flow-Aligned Guidance",
    2025, and its released code.
    """

    alpha: float = 1.0
    beta: float = 0.5
    ratio: float = 0.2

    name: ClassVar[str] = "flow"
    keeps_estimates: ClassVar[bool] = True
    rotary: ClassVar[Rotary | None] = Rotary("ntk", factor=10)
    proportional: ClassVar[bool] = True
    enlarging: ClassVar[str] = "bicubic"
    sharpens: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("alpha", "beta", "ratio"):
            object.__setattr__(self, name, positive(name, getattr(self, name)))

    def passes(self, job: Job) -> list[Pass]:
        shift = job.native_shift
        native = Pass(job.base, Part(job.steps, shift=shift), above_native=False)
        return [native, Pass(job.target, Part(job.steps, job.first, shift=shift))]

    def on_step(self, before: Before, part: Part) -> OnStep:
        kept: dict[str, torch.Tensor] = {}  # of the step before

        def follow(v: torch.Tensor, x: torch.Tensor, level: float, step: int, steps: int) -> torch.Tensor:
            ref = enlarged(before.estimates[part.first + step].to(x), x.shape[-2:])
            weight = (steps - step) / steps
            clean = x - level * v
            clean = clean + self.alpha * weight * (
                butterworth(ref, self.ratio) - butterworth(clean, self.ratio)
            )
            v, v_ref = ((x - one) / (level + 1e-6) for one in (clean, ref))
            if kept:
                v = v + self.beta * weight * (kept["v"] + v_ref - kept["v_ref"] - v)
            kept.update(v=v, v_ref=v_ref)
            return v

        return follow


def enlarged(latents: torch.Tensor, size: tuple[int, int] | torch.Size) -> torch.Tensor:
    """Latents (B, C, [F,] H, W) at another size, bicubic, each frame by itself."""
    shape = (*latents.shape[:-2], *size)
    flat = latents.flatten(0, -3)[:, None]
    return F.interpolate(flat, tuple(size), mode="bicubic", align_corners=False).reshape(shape)
