"""Videos longer than a model was trained for: every step is predicted in overlapping windows of frames."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dit_accel.arguments import integer, shown

from .method import Job, Method, Pass
from .schedule import Part
from .stand_in import StandIn, standing_in


def context_windows(frames: int, size: int, overlap: int) -> list[range]:
    """Windows of `size` latent frames that begin at multiples of `size` - `overlap`; the last slides back.

    Raises:
        ValueError: a size that is not positive, or an overlap that is not below it.
    """
    frames, size = integer("frames", frames, 1), integer("size", size, 1)
    if integer("overlap", overlap, 0) >= size:
        raise ValueError(f"`overlap` must be below `size` {size}, got {overlap}")
    if frames <= size:
        return [range(frames)]
    starts = range(0, frames - overlap, size - overlap)
    return [range(start, start + size) for start in (min(start, frames - size) for start in starts)]


def looped_windows(frames: int, size: int, overlap: int, step: int, stride: int) -> list[list[int]]:
    """Windows that go round the video, at strides 1, 2, 4, ..., and begin elsewhere at every step.

    Of each stride c below 2^S, S = min(stride, ceil(log2(frames / size)) + 1), windows (j + m c) mod frames,
    m = 0 .. size - 1, for j from int(h c) + pad below frames + pad in steps of c size - overlap, where h is
    the step with its bits reversed, as a binary fraction of 64 bits, and pad = round(frames h).
    """
    if frames <= size:
        return [list(range(frames))]
    reversed_bits = int(f"{step:064b}"[::-1], 2) / 2**64
    pad, found = round(frames * reversed_bits), []
    for level in range(min(stride, math.ceil(math.log2(frames / size)) + 1)):
        c = 2**level
        for j in range(int(reversed_bits * c) + pad, frames + pad, size * c - overlap):
            found.append([(j + m * c) % frames for m in range(size)])
    return found


def ramp(window: range, frames: int, overlap: int) -> torch.Tensor:
    """Weights of a window's frames, float32 (size,): 1, rising and falling linearly over the overlap.

    By (k + 1) / (overlap + 1), never 0; not at the first and the last frame of the video.
    """
    weights = torch.ones(len(window), dtype=torch.float32, device="cpu")
    slope = torch.arange(1, overlap + 1, dtype=torch.float32, device="cpu") / (overlap + 1)
    if window.start > 0:
        weights[:overlap] = torch.minimum(weights[:overlap], slope)
    if window.stop < frames and overlap:
        weights[-overlap:] = torch.minimum(weights[-overlap:], slope.flip(0))
    return weights


@dataclass(frozen=True)
class ContextWindows:
    """Predictions in windows of latent frames, accumulated with ramps in fp32 and divided by their sum.

    Args:
        size, overlap: in latent frames; those of Wan's 81 frames and 16 are 21 and 4.
        schedule: `"static"`: the same windows at all steps (`context_windows`), with linear ramps;
            `"looped"`: other ones at every step (`looped_windows`), which all weigh the same.
        stride: of `"looped"`: how many strides at most.

    Raises:
        ValueError: values outside of these forms.
    """

    size: int = 21
    overlap: int = 4
    schedule: str = "static"
    stride: int = 1

    def __post_init__(self):
        context_windows(self.size, self.size, self.overlap)
        integer("stride", self.stride, 1)
        if self.schedule not in ("static", "looped"):
            raise ValueError(f"`schedule` must be 'static' or 'looped', got {shown(self.schedule)}")

    def at(self, frames: int, step: int) -> list[tuple[list[int], torch.Tensor]]:
        """Windows of a step with their weights."""
        if self.schedule == "static":
            windows = context_windows(frames, self.size, self.overlap)
            return [(list(window), ramp(window, frames, self.overlap)) for window in windows]
        looped = looped_windows(frames, self.size, self.overlap, step, self.stride)
        return [(window, torch.ones(len(window), dtype=torch.float32, device="cpu")) for window in looped]

    def applied(self, pipe: Any) -> AbstractContextManager[None]:
        """A pipeline's transformers predict in windows for the length of a `with` block.

        Recipes are enabled and methods applied before; each window is a call of theirs.
        """
        return standing_in(pipe, lambda transformer: _InWindows(transformer, self))


class _InWindows(StandIn):
    """Stands in for a video transformer whose calls are made window by window."""

    def __init__(self, transformer: Any, windows: ContextWindows):
        super().__init__(transformer)
        self._windows, self._step, self._timestep = windows, -1, math.nan

    def predict(self, *, hidden_states: torch.Tensor, timestep: torch.Tensor, **inputs: Any) -> torch.Tensor:
        value = float(timestep.max())
        if value != self._timestep:  # guidance branches of a step share theirs
            self._step, self._timestep = self._step + 1, value
        frames = hidden_states.shape[2]
        weight = torch.zeros(frames, dtype=torch.float32, device=hidden_states.device)
        total = weight[:0]
        for window, ramps in self._windows.at(frames, self._step):
            own, ramps = hidden_states[:, :, window], ramps.to(hidden_states.device)
            when = timestep
            if timestep.ndim == 2:  # Wan 2.2 5B: a timestep for each token
                when = timestep.unflatten(1, (frames, -1))[:, window].flatten(1)
            out = self.inner(hidden_states=own, timestep=when, **inputs)
            if not total.numel():
                shape = (*out.shape[:2], frames, *out.shape[3:])
                total = torch.zeros(shape, dtype=torch.float32, device=out.device)
            places = torch.tensor(window, device=out.device)
            total.index_add_(2, places, out.float() * _over_frames(ramps))
            weight.index_add_(0, places, ramps)
        return (total / _over_frames(weight)).to(hidden_states.dtype)


def _over_frames(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None]


@dataclass(frozen=True)
class TimeWindows(Method):
    """A longer video at the size that is asked for, in one pass, in windows over time alone."""

    name: ClassVar[str] = "windows"

    def passes(self, job: Job) -> list[Pass]:
        return [Pass(job.target, Part(job.steps))]
