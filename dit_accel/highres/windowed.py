"""Methods that attend in windows above native size: CLEAR's recipe and HiDiffusion's shifted windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.patterns import Clear, Pattern, ShiftedWindow

from .direct import half_window
from .extrapolation import Rotary
from .method import Method, Windowed
from .native import Native, Size


@dataclass(frozen=True)
class ClearWindows(Windowed):
    """CLEAR's recipe for high resolution: discs, positions slowed down by NTK, proportional attention.

    Published for FLUX with strength 0.7 of 20 steps, shift 3 and guidance 7.5 (3.5 in the native pass). The
    released checkpoints were trained to attend in discs, a model as it is was not.

    Args:
        radius: of the disc in tokens, see `dit_accel.patterns.Clear`; published 8, 16 and 32.

    Source: Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", 2024.
    """

    radius: float = 16

    name: ClassVar[str] = "clear"
    rotary: ClassVar[Rotary | None] = Rotary("ntk", factor=10)
    proportional: ClassVar[bool] = True

    @classmethod
    def suited(cls, native: Native, base: Size) -> Method:
        return cls(max(1, min(16, *half_window(native, base))))

    def pattern(self) -> Pattern:
        return Clear(self.radius)


@dataclass(frozen=True)
class Shifted(Windowed):
    """Windows that cut the picture, shifted by quarters of a window from step to step: MSW-MSA.

    Args:
        windows: number of windows (rows, columns); published (2, 2).
        seed: of the shifts.

    Source: Zhang et al., "HiDiffusion: Unlocking Higher-Resolution Creativity and Efficiency in Pretrained
    Diffusion Models", 2024.
    """

    windows: tuple[int, int] = (2, 2)
    seed: int = 0

    name: ClassVar[str] = "shifted"

    def __post_init__(self):
        self.pattern()  # which checks

    def pattern(self) -> Pattern:
        return ShiftedWindow(self.windows, seed=self.seed)
