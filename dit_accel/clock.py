"""Which sampler step a call of the transformer belongs to."""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch


class Tick(NamedTuple):
    """The step of a call, the number of steps of its run (None: not known), and whether it starts the run."""

    step: int
    total: int | None
    new_run: bool


class Clock:
    """Steps of the runs of one pipeline or bare transformer.

    From a pipeline, step and total come from its scheduler, so that guidance branches and batches do not
    count, and a run that was aborted leaves nothing behind. A scheduler of order 2 is called twice per step.
    From a bare transformer, or between a pipeline's runs, a change of the timestep's value is a step and a
    rise starts a new run.
    """

    def __init__(self, pipeline: Any = None):
        self._pipeline = (lambda: None) if pipeline is None else weakref.ref(pipeline)
        self._scheduler = getattr(pipeline, "scheduler", None)
        self._run: Any = (
            None  # identity of the run: the scheduler's timesteps, or None for a bare transformer
        )
        self._step = -1
        self._value = -math.inf
        self._total: int | None = None
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
        self._run, self._step, self._value, self._total = None, -1, -math.inf, steps

    def tick(self, timestep: torch.Tensor | float) -> Tick:
        """Called once per call of the transformer, with its timestep."""
        return self._from_scheduler() or self._from_value(timestep)

    def _from_scheduler(self) -> Tick | None:
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
        new_run = timesteps is not self._run or step < self._step
        self._run, self._step, self.evaluation = timesteps, step, calls
        return Tick(step, total, new_run)

    def _from_value(self, timestep: torch.Tensor | float) -> Tick:
        value = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
        new_run = self._run is not None or self._step < 0 or value > self._value
        if new_run:
            self._run, self._step = None, 0
        elif value < self._value:
            self._step += 1
        self._value, self.evaluation = value, None
        return Tick(self._step, self._total, new_run)
