"""Runs of a sampler: which calls of the transformer are of a run, and of which of its steps."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch

from dit_accel.attention.run_memory import RunMemory
from dit_accel.errors import UnavailableError


class CountedRun:
    """A run of which only the timesteps of its calls are known: a change of the value is a step.

    Timesteps may fall or rise, which the second value decides. `takes` is whether a call is of the run, and
    counts it if so.
    """

    def __init__(self, total: int | None = None, before: ScheduledRun | None = None):
        """`total` steps, None: not known; `before` are its calls that were taken for those of a scheduler."""
        self.number, self.memory = (before.number, before.memory) if before else (None, None)
        self.step, self.evaluation = (before.step, before.evaluation) if before else (-1, -1)
        self.total = total
        self.value = before and before.value  # of the latest call
        self._rising = before and before.rising

    def takes(self, value: float) -> bool:
        if value == self.value:
            return True
        if self.value is not None:
            rising = value > self.value
            if self._rising not in (None, rising) or self.step + 1 == self.total:
                return False
            # a rise to pure noise is where a sampling run begins, after a warm-up or an inversion
            if rising and self.total is None and (value if value <= 1 else value / 1000) >= 0.999:
                return False
            self._rising = rising
        self.step, self.evaluation, self.value = self.step + 1, self.evaluation + 1, value
        return True


class ScheduledRun:
    """A run of a scheduler, which begins at the first call that fits it.

    `takes` is whether a call is of the run while the scheduler's step index is `index`, and counts it if so:
    its timestep is the one there or, if the scheduler has not moved on since the call before, lies between
    that and the next. Where a pipeline makes steps without the scheduler's `step`, only the place of the
    timestep among the scheduler's counts; then the second step is taken for a part of the first, as it would
    be for a second evaluation at the end of the first step (Heun's method).
    """

    def __init__(self, scheduler: Any, pipeline: Any, timestep: torch.Tensor | float, value: float):
        self.number: int | None = None
        self.memory: RunMemory | None = None
        self.thread, self.disputed = threading.get_ident(), False  # disputed: others may be of it instead
        self.step, self.total, self.evaluation = 0, 0, -1
        self.timesteps, self._order = scheduler.timesteps, getattr(scheduler, "order", 1)
        self._scheduler_name, self._noise_levels = type(scheduler).__name__, _noise_levels(scheduler)
        self.index: int | None = getattr(scheduler, "step_index", None)  # at the latest call
        self.value = math.nan  # of the latest call
        self._interrupted = getattr(pipeline, "interrupt", False)  # before: in an earlier run
        begin = getattr(scheduler, "begin_index", None)
        self._schedule = _Schedule(scheduler, begin if self.index is None else self.index, timestep, value)
        if begin is not None:
            self._first = begin
        elif self.index is None:
            self._first = self._schedule.nearest(value)  # pipelines that run a part of it need not say so
        else:  # met in mid-run, or of a scheduler that has looked the first timestep up to add noise
            length = getattr(pipeline, "num_timesteps", None)
            first = self.index if length is None else len(self.timesteps) - length
            self._first = first if 0 <= first <= self.index else self.index
        self._position: int | None = None  # of the latest call's step in the timesteps
        self._place = self._first  # of the latest call's own timestep
        self._between = False  # whether there were calls between timesteps
        self._by_hand = not hasattr(scheduler, "step_index")  # whether only the place of a timestep counts

    @property
    def rising(self) -> bool:
        return self._schedule.rising

    @property
    def noise_level(self) -> float:
        """Of the flow, at which the step of the latest call begins.

        Raises:
            UnavailableError: a scheduler of something else than a flow.
        """
        levels, steps = self._noise_levels, self.step * self._order
        if levels is None:
            raise UnavailableError(
                f"a recipe by noise level needs a scheduler of flows, whose `sigmas` are from 0 to 1, got "
                f"{self._scheduler_name}; name steps by number, such as `dense_steps=2`"
            )
        backwards = self._position is not None and self._position < self._first
        return levels[self._first + (-steps if backwards else steps)]

    def is_interrupted(self, pipeline: Any) -> bool:
        """Whether the pipeline was told to stop in this run, after which it makes no more calls."""
        return getattr(pipeline, "interrupt", False) and not self._interrupted

    def is_over_at(self, index: int | None) -> bool:
        """Whether a scheduler with this step index has begun anew on the same timesteps."""
        return self.index is not None and (index is None or index < self.index)

    def takes(self, index: int | None, value: float) -> bool:
        schedule, position = self._schedule, self._position
        place = schedule.nearest(value)
        neighbour = index is None and abs(place - self._place) == 1 and schedule.fits(place, value)
        if position is None or index != self.index:  # the first call, or the scheduler has moved on
            position = self._first if index is None else index
            taken = schedule.fits(position, value) or (self._between and schedule.spans(position, value))
            if not taken or position < self._first:
                return False
        elif neighbour and (self._by_hand or not schedule.spans(position, value)):
            position, self._by_hand = place, True
        elif not schedule.fits(position, value):
            if not schedule.spans(position, value):
                return False
            self._between = True
        if schedule.fits(place, value):
            self._place = place
        self.evaluation += (position, value) != (self._position, self.value)
        self.index, self.value, self._position = index, value, position
        # by hand, steps may go from the last timestep to the first
        length = self._first + 1 if position < self._first else len(self.timesteps) - self._first
        self.step, self.total = abs(position - self._first) // self._order, math.ceil(length / self._order)
        return True


def _noise_levels(scheduler: Any) -> list[float] | None:
    """The noise levels of a flow's scheduler, of each timestep; None where they are no flow's."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) < len(scheduler.timesteps):
        return None
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").tolist()
    if getattr(getattr(scheduler, "config", None), "invert_sigmas", False):  # Mochi's, 1 without noise
        levels = [1 - level for level in levels]
    # float32's rounding must not decide on which side of a round number a level is
    return [round(level, 6) for level in levels] if 0 <= min(levels) <= max(levels) <= 1 else None


class _Schedule:
    """A scheduler's timesteps as the transformer gets them: with some pipelines from 0 to 1, or rounded."""

    def __init__(self, scheduler: Any, stand: int | None, timestep: torch.Tensor | float, value: float):
        """`timestep` and its `value` are the first call's; `stand` is where the scheduler stands at it."""
        timesteps = torch.as_tensor(scheduler.timesteps, device="cpu")
        as_it_is = stand is not None and stand < len(timesteps) and value == timesteps[stand]
        scaled = 0 < value <= 1 < timesteps.max() and not as_it_is
        unit = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1) if scaled else 1
        floating = isinstance(timestep, torch.Tensor) and timestep.is_floating_point()
        self._values = (timesteps.to(timestep.dtype if floating else torch.float64) / unit).tolist()
        self._same_as_next = [*(timesteps[1:] == timesteps[:-1]).tolist(), False]
        self.rising = self._values[-1] > self._values[0]

    def nearest(self, value: float) -> int:
        """The timestep nearest to a value: of two that are the same the second, as for schedulers."""
        index = min(range(len(self._values)), key=lambda i: abs(self._values[i] - value))
        return index + self._same_as_next[index]

    def fits(self, index: int, value: float) -> bool:
        """Whether a value is a timestep's: up to 1% off, as it may be rounded, but not nearer to another."""
        if index >= len(self._values):
            return False
        there, nearest = self._values[index], self._values[self.nearest(value)]
        near = math.isclose(there, value, rel_tol=0.01, abs_tol=1e-4 * max(self._values))
        return near and abs(there - value) <= abs(nearest - value)

    def spans(self, index: int, value: float) -> bool:
        """Whether a value lies between a timestep and the next one, both included."""
        if index >= len(self._values):
            return False
        ends = [*self._values, math.inf if self.rising else 0.0][index : index + 2]
        return min(ends) <= value <= max(ends)
