"""Which sampler step a call of the transformer belongs to."""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch


class Tick(NamedTuple):
    """The step of a call, the number of steps of its run (None: not known), and the number of the run."""

    step: int
    total: int | None
    run: int


class Clock:
    """Steps of the runs of one pipeline or bare transformer.

    From a pipeline, step and total come from its scheduler, so that guidance branches and batches do not
    count, and a run that was aborted leaves nothing behind. A scheduler of order 2 is called twice per step.
    From a bare transformer, or when a call is not of the pipeline's run, a change of the timestep's value is
    a step and a rise starts a new run.
    """

    def __init__(self, pipeline: Any = None):
        self._pipeline = (lambda: None) if pipeline is None else weakref.ref(pipeline)
        self._scheduler = getattr(pipeline, "scheduler", None)
        self._timesteps: Any = None  # of the scheduler's run that the latest call was of
        self._call: tuple[int, int] | None = None  # of it: whose timesteps, which call
        self._step = -1
        self._value = -math.inf
        self._announced: int | None = None  # steps of the next run of a bare transformer
        self._total: int | None = None
        self._runs = 0
        self.evaluation: int | None = None  # of the run, from 0, in the latest tick; None: not known

    @property
    def pipeline(self) -> Any:
        """The pipeline, or None for a bare transformer or a pipeline that is gone."""
        return self._pipeline()

    def __deepcopy__(self, memo: dict) -> Clock:
        return Clock()  # the copy of a transformer belongs to no pipeline yet

    def begin(self, steps: int) -> None:
        """Announce a run of `steps` steps of a bare transformer; the next call is its first.

        Raises:
            ValueError: not a positive integer.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`steps` must be a positive integer, got {steps!r}")
        self._timesteps, self._step, self._value, self._announced = None, -1, -math.inf, steps

    def tick(self, timestep: torch.Tensor | float) -> Tick:
        """Called once per call of the transformer, with its timestep."""
        return self._from_scheduler(timestep) or self._from_value(_largest(timestep))

    def _from_scheduler(self, timestep: torch.Tensor | float) -> Tick | None:
        if (pipeline := self.pipeline) is not None:
            self._scheduler = getattr(pipeline, "scheduler", None)
        scheduler = self._scheduler  # outlives its pipeline: `from_pipe` shares it
        timesteps = getattr(scheduler, "timesteps", None)
        # before its first `set_timesteps` a scheduler holds the timesteps of training
        never_set = getattr(scheduler, "num_inference_steps", None) is None
        if timesteps is None or never_set or not hasattr(scheduler, "step_index"):
            return None
        first = getattr(scheduler, "begin_index", None) or 0
        calls = 0 if scheduler.step_index is None else scheduler.step_index - first
        step, total = calls // scheduler.order, math.ceil((len(timesteps) - first) / scheduler.order)
        if not 0 <= step < total:
            return None
        # A scheduler that has not moved on may have been left behind by a run that was aborted. Only then the
        # values are looked at, for which a GPU has to be waited for.
        call = (id(timesteps), calls)
        if call == self._call and not _same(timestep, timesteps[first + calls], scheduler):
            return None
        if timesteps is not self._timesteps or step < self._step:
            self._runs += 1
        self._timesteps, self._call, self._step, self.evaluation = timesteps, call, step, calls
        return Tick(step, total, self._runs)

    def _from_value(self, value: float) -> Tick:
        if self._timesteps is not None or self._step < 0 or value > self._value:
            self._runs += 1
            self._timesteps, self._step = None, 0
            self._total, self._announced = self._announced, None
        elif value < self._value:
            self._step += 1
        self._value, self.evaluation = value, None
        return Tick(self._step, self._total, self._runs)


def _largest(timestep: torch.Tensor | float) -> float:
    """The value of a timestep: of one per sample or token, the noisiest."""
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)


def _same(timestep: torch.Tensor | float, scheduled: torch.Tensor, scheduler: Any) -> bool:
    """Whether a transformer's timestep is the scheduler's: rounded to half precision, or from 0 to 1."""
    value, expected = _largest(timestep), float(scheduled)
    units = (1, getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1))
    return any(math.isclose(value * unit, expected, rel_tol=0.01, abs_tol=0.01) for unit in units)
