"""Sampler steps: which step of which run a call of the transformer belongs to."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dit_accel.attention.run_memory import RunMemory
from dit_accel.errors import UnavailableError

from .sampler_runs import CountedRun, ScheduledRun


class Tick(NamedTuple):
    """The place of a call of the transformer.

    Attributes:
        step: sampler step, from 0.
        total: steps of the run; None: not known.
        run: number of the run, from 1.
        evaluation: which evaluation of the model it belongs to, from 0 in each run: calls with one timestep,
            such as guidance branches, are one, a midpoint is another; None: not known.
    """

    step: int
    total: int | None
    run: int
    evaluation: int | None = None


def level_of(timestep: Any, pure_noise: float, clean: float) -> Any:
    """The noise level of a flow at a timestep: from `pure_noise` down to 0, or from 0 up to `clean`."""
    return timestep / pure_noise if pure_noise else 1 - timestep / clean


def timestep_at(level: Any, pure_noise: float, clean: float) -> Any:
    """The inverse of `level_of`."""
    return level * pure_noise if pure_noise else (1 - level) * clean


class StepTracker:
    """Counts the sampler steps of a pipeline or bare transformer, for each thread by itself.

    For a pipeline, steps are where its scheduler stands, so that guidance branches, batches and solvers that
    evaluate between two timesteps do not count, and a run begins at its first timestep, also where only a
    part of the schedule is run. The pipeline is the one whose `__call__` is in progress in the thread, which
    need not be the one that the tracker was made for (several may share a transformer). Only Python's stack
    tells; where it has none, as in loops of one's own, it is the one that the tracker was made for.

    The scheduler is believed while the calls' timesteps fit where it stands. Calls that do not fit, and those
    of a bare transformer, are followed by their own timesteps: a change of the value is a step, a change of
    direction a new run, and `begin` says how many steps.

    The timestep is read from its device once for each call, but not again for the same tensor in one step
    (as diffusers passes it to guidance branches), and the scheduler's timesteps once for each run.
    """

    def __init__(self, pipeline: Any = None):
        self._pipeline = _nothing if pipeline is None else weakref.ref(pipeline)
        self._scheduler = getattr(pipeline, "scheduler", None)
        self._in_pipeline = pipeline is not None
        self._numbers = itertools.count(1)
        self._latest: ScheduledRun | None = None  # in any thread
        self._lock = threading.Lock()
        self._thread = _Thread()

    def __reduce__(self) -> tuple:
        return StepTracker, ()  # the copy of a transformer belongs to no pipeline yet

    @property
    def pipeline(self) -> Any:
        """The pipeline of this thread's latest call, else the one the tracker was made for, else None."""
        caller = self._thread.caller()
        return self._pipeline() if caller is None else caller

    @property
    def evaluation(self) -> int | None:
        """That of this thread's latest tick."""
        return self._thread.tick and self._thread.tick.evaluation

    @property
    def memory(self) -> RunMemory:
        """What the run of this thread's latest tick keeps from step to step."""
        run = self._thread.run
        if run is None or run.memory is None:
            raise RuntimeError("this thread has made no call of the transformer yet")
        return run.memory

    def noise_level(self, pure_noise: float | None, clean: float = 1000.0) -> float:
        """The flow's noise level at which the step of this thread's latest tick begins, 1 for pure noise.

        By the scheduler where that tells the step, so that all evaluations of a step have one; else by the
        call's timestep, of which `pure_noise` is the one at level 1, None: not known. Of 0 they rise to
        `clean`.

        Raises:
            UnavailableError: a scheduler of something else than a flow, or timesteps of unknown meaning.
            ValueError: a timestep that is none of a flow's.
        """
        run = self._thread.run
        if isinstance(run, ScheduledRun):
            return run.noise_level
        if pure_noise is None:
            raise UnavailableError(
                "a recipe by noise level needs to know what the timesteps of a transformer mean, and "
                "those of this one are not known; enable it on its pipeline, whose scheduler tells, or name "
                "steps by number, such as `dense_steps=2`"
            )
        if run is None or run.value is None:
            raise RuntimeError("this thread has made no call of the transformer yet")
        level = round(level_of(run.value, pure_noise, clean), 6)
        if not 0 <= level <= 1:
            noise = "which is pure noise"
            ends = f"0, {noise}, to {clean:g}" if pure_noise == 0 else f"0 to {pure_noise:g}, {noise}"
            raise ValueError(
                f"timestep {run.value:g} is no noise level of a flow: this transformer takes timesteps "
                f"from {ends}"
            )
        return level

    def begin(self, steps: int) -> None:
        """Announce a run of `steps` steps of a bare transformer; this thread's next call is its first.

        Raises:
            ValueError: not a positive integer.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`steps` must be a positive integer, got {steps!r}")
        self._thread.run, self._thread.announced = None, steps

    def tick(
        self, timestep: torch.Tensor | float, between: bool = False, kept: torch.Tensor | None = None
    ) -> Tick:
        """Called once per call of the transformer.

        Args:
            timestep: of the call: (B,), (B, tokens) or a number.
            between: whether it is between steps: then it is of the latest one, or, where no step of the
                generation came before, as of given frames, of a run of its own, of one step.
            kept: what all calls of the generation have in common, and no others.
        """
        thread, goes_on = self._thread, kept is not None and self._thread.kept() is kept
        if between and goes_on and thread.tick is not None:
            return thread.tick
        if between:
            self.begin(1)
        thread.kept = _nothing if kept is None else weakref.ref(kept)
        caller = _calling_pipeline() if self._in_pipeline else None
        thread.caller = _nothing if caller is None else weakref.ref(caller)
        scheduler = self._current_scheduler(caller)
        stand = (getattr(scheduler, "timesteps", None), getattr(scheduler, "step_index", None))
        stands_still = stand[0] is thread.stand[0] and stand[1] == thread.stand[1]
        latest = thread.tick
        if latest and stands_still and timestep is thread.timestep and isinstance(thread.run, ScheduledRun):
            return latest
        run = self._run_of(timestep, scheduler, stands_still)
        run.number, run.memory = run.number or next(self._numbers), run.memory or RunMemory()
        evaluation = run.evaluation if self._in_pipeline else None
        thread.run, thread.stand, thread.timestep = run, stand, timestep
        thread.tick = tick = Tick(run.step, run.total, run.number, evaluation)
        return tick

    def _current_scheduler(self, caller: Any) -> Any:
        if (pipeline := self._pipeline()) is not None:
            self._scheduler = getattr(pipeline, "scheduler", None)
        # the tracker's outlives its pipeline: `from_pipe` shares it
        scheduler = self._scheduler if caller is None else caller.scheduler
        # before its first `set_timesteps` a scheduler holds the timesteps of training
        ready = getattr(scheduler, "num_inference_steps", None) is not None
        return scheduler if ready and getattr(scheduler, "timesteps", None) is not None else None

    def _run_of(
        self, timestep: torch.Tensor | float, scheduler: Any, stands_still: bool
    ) -> ScheduledRun | CountedRun:
        """The run of a call, which is counted in it."""
        thread, value = self._thread, _largest(timestep)
        run, steps, thread.announced = thread.run, thread.announced, None
        # a run that was announced is not the scheduler's, nor is one that goes on while that stands still
        if isinstance(run, CountedRun) and (run.total is not None or stands_still) and run.takes(value):
            return run
        if steps is None and (scheduled := self._scheduled_run(timestep, value, scheduler)) is not None:
            return scheduled
        if isinstance(run, ScheduledRun):
            # a scheduler that made no step, or may be another thread's, says nothing of the calls that follow
            unsure = run.disputed or getattr(scheduler, "step_index", None) is None
            run = CountedRun(before=run) if unsure else None
        if run is not None and run.takes(value):
            return run
        run = CountedRun(total=steps)
        run.takes(value)
        return run

    def _scheduled_run(
        self, timestep: torch.Tensor | float, value: float, scheduler: Any
    ) -> ScheduledRun | None:
        """The scheduler's run if the call fits where it stands."""
        if scheduler is None:
            return None
        thread, pipeline, index = self._thread, self.pipeline, getattr(scheduler, "step_index", None)
        with self._lock:
            latest, run = self._latest, thread.scheduled
            others = (
                latest and latest.timesteps is scheduler.timesteps and latest.thread != threading.get_ident()
            )
            if others and thread.caller() is None:
                latest.disputed |= index is None
                return None
            if run is None or run.timesteps is not scheduler.timesteps or run.is_over_at(index):
                run = ScheduledRun(scheduler, pipeline, timestep, value)
            if run.is_interrupted(pipeline) or not run.takes(index, value):
                return None
            if others:
                latest.disputed = True
            self._latest = thread.scheduled = run
        return run


class _Thread(threading.local):
    """What a tracker knows of the calls of a thread, each thread seeing its own."""

    def __init__(self):
        self.caller: Callable[[], Any] = _nothing  # the pipeline that makes the latest call
        self.tick: Tick | None = None  # of it
        self.run: ScheduledRun | CountedRun | None = None  # of it
        self.timestep: Any = None  # of it
        self.stand: tuple[Any, int | None] = (None, None)  # the scheduler's timesteps and step index then
        self.scheduled: ScheduledRun | None = None  # the latest of a scheduler
        self.announced: int | None = None  # steps of the next run
        self.kept: Callable[[], Any] = _nothing  # by calls of its generation


def _largest(timestep: torch.Tensor | float) -> float:
    """The value of a timestep: of one per sample or token, the noisiest."""
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)


def _nothing() -> None:
    """Stands for a reference where there is none."""


def _calling_pipeline() -> Any:
    """The innermost pipeline whose `__call__` this thread is in, None: there is none.

    Nothing else tells the pipelines apart that share a transformer: a call brings no more than tensors.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
            caller = frame.f_locals.get("self")
            if hasattr(caller, "scheduler") and hasattr(caller, "transformer"):
                return caller
        frame = frame.f_back
    return None
