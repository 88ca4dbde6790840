"""Steps of runs that a scheduler or only their timesteps tell, through a tracker."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler
from sampling_loops import NAMES, SCHEDULERS, Euler, Pipe, flow_unipc, places, run, steps_of

from dit_accel.runtime.steps import StepTracker


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=NAMES)
def test_scheduler(scheduler, calls):
    pipe = Pipe(scheduler())
    tracker, runs = StepTracker(pipe), []
    for steps in (3, 3, 1, 1, 4, 50):
        ticks = run(pipe, tracker, steps, calls)
        assert places(ticks) == [(i, steps) for i in range(steps) for _ in range(calls)]
        assert [tick.evaluation for tick in ticks] == [tick.step for tick in ticks]
        assert len({tick.run for tick in ticks}) == 1
        runs.append(ticks[0].run)
    assert runs == [1, 2, 3, 4, 5, 6]
    assert tracker.evaluation == 49


@pytest.mark.parametrize("scheduler", [FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("calls", [1, 2])
def test_scheduler_of_order_2(scheduler, calls):
    """It is called for each of a step's two evaluations, which are not each other's guidance branches."""
    pipe = Pipe(scheduler())
    ticks = run(pipe, StepTracker(pipe), 3, calls)
    assert places(ticks) == [(step, 3) for step in (0, 0, 1, 1, 2) for _ in range(calls)]
    assert [tick.evaluation for tick in ticks] == [i for i in range(5) for _ in range(calls)]


@pytest.mark.parametrize("says", [False, True], ids=["silently", "with set_begin_index"])
@pytest.mark.parametrize(("steps", "first"), [(8, 4), (5, 1), (10, 8), (50, 20)])
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=NAMES)
def test_part_of_a_schedule(scheduler, steps, first, says):
    pipe = Pipe(scheduler())
    tracker = StepTracker(pipe)
    for _ in range(2):
        ticks = run(pipe, tracker, steps, 2, first, says=says)
        assert places(ticks) == [(i, steps - first) for i in range(steps - first) for _ in range(2)]
    assert places(run(pipe, tracker, 3)) == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("says", [False, True], ids=["silently", "with set_begin_index"])
def test_part_of_a_schedule_of_order_2(says):
    pipe = Pipe(FlowMatchHeunDiscreteScheduler())
    ticks = run(pipe, StepTracker(pipe), 6, 1, 2 * 2, says=says)
    assert places(ticks) == [(0, 4), (0, 4), (1, 4), (1, 4), (2, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize("unit", [1, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("steps", "first"), [(28, None), (50, None), (28, 10)])
def test_rounded_and_scaled_timesteps(steps, first, dtype, unit):
    pipe = Pipe(Euler(shift=3.0))
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(steps)
    ticks = [tracker.tick(t.expand(1).to(dtype) / unit) for t in steps_of(pipe.scheduler, first)]
    total = steps - (first or 0)
    assert places(ticks) == [(i, total) for i in range(total)]


def test_timesteps_that_were_rounded_before():
    pipe = Pipe(Euler())
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(20)
    ticks = [tracker.tick(float(t.bfloat16()) / 1000) for t in steps_of(pipe.scheduler)]
    assert places(ticks) == [(i, 20) for i in range(20)]


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("parts", [(0, 0.5), (0, 1), (0, 0.25, 0.75, 1)], ids=["midpoint", "Heun", "four"])
@pytest.mark.parametrize("scheduler", SCHEDULERS[:4], ids=NAMES[:4])
def test_solver_with_several_evaluations_in_a_step(scheduler, parts, branches):
    """In the pipeline's loop, around a scheduler that knows nothing of it."""
    pipe = Pipe(scheduler())
    tracker, ticks = StepTracker(pipe), []
    pipe.scheduler.set_timesteps(6)
    ends = [*pipe.scheduler.timesteps[1:], torch.tensor(0)]
    for t, end in zip(steps_of(pipe.scheduler), ends, strict=True):
        for part in parts:
            ticks += [tracker.tick((t + part * (end - t)).expand(2)) for _ in range(branches)]
    assert places(ticks) == [(step, 6) for step in range(6) for _ in range(len(parts) * branches)]
    assert len({tick.run for tick in ticks}) == 1
    assert [tick.evaluation for tick in ticks] == [i for i in range(6 * len(parts)) for _ in range(branches)]


def test_solver_that_keeps_its_evaluation_for_the_next_step():
    """FireFlow evaluates at midpoints alone after its first step."""
    pipe = Pipe(Euler())
    tracker, ticks = StepTracker(pipe), []
    pipe.scheduler.set_timesteps(5)
    for t, end in zip(steps_of(pipe.scheduler), [*pipe.scheduler.timesteps[1:], 0], strict=True):
        ticks += [tracker.tick(x) for x in ((t, (t + end) / 2) if not ticks else ((t + end) / 2,))]
    assert places(ticks) == [(0, 5), (0, 5), (1, 5), (2, 5), (3, 5), (4, 5)]


@pytest.mark.parametrize("first", [0, 3])
def test_steps_made_without_the_scheduler(first):
    """The second might be a second evaluation of the first step; the place of the timestep tells the rest."""
    pipe = Pipe(Euler())
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(8)
    ticks = [tracker.tick(t) for t in pipe.scheduler.timesteps[first:] for _ in range(2)]
    assert places(ticks) == [(i, 8 - first) for i in (0, 0, *range(2, 8 - first)) for _ in range(2)]


def test_scheduler_without_a_step_index():
    pipe = Pipe(DDIMScheduler())
    assert places(run(pipe, StepTracker(pipe), 5, 2)) == [(i, 5) for i in range(5) for _ in range(2)]


def test_schedule_run_backwards():
    pipe = Pipe(Euler())
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(sigmas=[1 - i / 6 for i in range(6)])
    ticks = [tracker.tick(t) for t in pipe.scheduler.timesteps.flip(0)]
    assert [tick.step for tick in ticks] == list(range(6))
    assert {tick.total for tick in ticks[1:]} == {6}


def test_rising_schedule():
    pipe = Pipe(Euler(invert_sigmas=True))
    for first in (None, 3):
        ticks = run(pipe, StepTracker(pipe), 7, 2, first)
        total = 7 - (first or 0)
        assert places(ticks) == [(i, total) for i in range(total) for _ in range(2)]


# -- by their timesteps alone --------------------------------------------------------------------------------


def test_bare_transformer():
    tracker = StepTracker()
    values = [9.0, 9.0, 5.0, 5.0, 1.0, 9.0, 5.0]
    ticks = [tracker.tick(torch.full((2,), v)) for v in values]
    assert [t.step for t in ticks] == [0, 0, 1, 1, 2, 0, 1]
    assert [t.run for t in ticks] == [1, 1, 1, 1, 1, 2, 2]
    assert {(t.total, t.evaluation) for t in ticks} == {(None, None)}


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize(("steps", "shift"), [(8, 1.0), (28, 3.0), (2, 1.0), (50, 12.0)])
def test_rising_timesteps(steps, shift, announced, scale):
    """Inversion, from a picture to noise, and then sampling."""
    tracker = StepTracker()
    sigmas = [shift * i / (steps + (shift - 1) * i) for i in range(steps)]
    for direction in (sigmas, [1 - sigma for sigma in sigmas]):
        if announced:
            tracker.begin(steps)
        ticks = [tracker.tick(torch.tensor([sigma * scale])) for sigma in direction for _ in range(2)]
        total = steps if announced else None
        assert places(ticks) == [(i, total) for i in range(steps) for _ in range(2)]
        assert len({tick.run for tick in ticks}) == 1


def test_run_after_a_single_call():
    """A warm-up or a run of one step, at less noise than where sampling begins."""
    tracker = StepTracker()
    assert [tracker.tick(t).step for t in (0.5, 1.0, 0.75, 0.5, 0.25)] == [0, 0, 1, 2, 3]
    assert [tracker.tick(t).step for t in (100, 1000, 600.0, 200.0)] == [0, 0, 1, 2]


def test_timestep_per_token():
    tracker = StepTracker()
    assert tracker.tick(torch.tensor([[0.0, 9.0]])).step == 0
    assert tracker.tick(torch.tensor([[0.0, 5.0]])).step == 1
    pipe = Pipe(flow_unipc())
    pipe.scheduler.set_timesteps(4)
    tracker = StepTracker(pipe)
    ticks = [
        tracker.tick((torch.tensor([[0.0, 1.0, 1.0]]) * t).expand(2, -1)) for t in steps_of(pipe.scheduler)
    ]
    assert places(ticks) == [(i, 4) for i in range(4)]
