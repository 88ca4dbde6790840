import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler

from dit_accel.clock import Clock, Tick


class Pipe:
    def __init__(self, scheduler):
        self.scheduler = scheduler


def run(pipe, clock, steps, calls_per_step=1, stop=None):
    """The ticks of one sampling loop, as diffusers pipelines write it."""
    pipe.scheduler.set_timesteps(steps)
    ticks, sample = [], torch.zeros(1, 4, 2, 2)
    for i, t in enumerate(pipe.scheduler.timesteps):
        if i == stop:
            break
        ticks += [clock.tick(t) for _ in range(calls_per_step)]
        sample = pipe.scheduler.step(sample, t, sample).prev_sample
    return ticks


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler])
def test_scheduler(scheduler, calls):
    pipe = Pipe(scheduler())
    clock, runs = Clock(pipe), []
    for steps in (3, 3, 1, 1, 4):
        ticks = run(pipe, clock, steps, calls)
        assert [(t.step, t.total) for t in ticks] == [(i, steps) for i in range(steps) for _ in range(calls)]
        assert len({t.run for t in ticks}) == 1
        runs.append(ticks[0].run)
    assert runs == [1, 2, 3, 4, 5]


def test_second_order_scheduler():
    pipe = Pipe(FlowMatchHeunDiscreteScheduler())
    ticks = run(pipe, Clock(pipe), 3)
    assert [(t.step, t.total) for t in ticks] == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3)]


def test_aborted_run():
    pipe = Pipe(FlowMatchEulerDiscreteScheduler())
    clock = Clock(pipe)
    assert len(run(pipe, clock, 5, stop=3)) == 3
    assert run(pipe, clock, 5)[0] == Tick(0, 5, 2)


@pytest.mark.parametrize("unit", [1, 1000])
@pytest.mark.parametrize("calls", [1, 2])
def test_calls_after_an_aborted_run_are_not_of_it(calls, unit):
    """Its scheduler stands still, so only their timesteps tell them."""
    pipe = Pipe(FlowMatchEulerDiscreteScheduler(shift=3.0))
    clock = Clock(pipe)
    values = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.scheduler.set_timesteps(4)
    values.set_timesteps(6)
    for t in pipe.scheduler.timesteps[:2]:
        assert {clock.tick(t.to(torch.bfloat16) / unit) for _ in range(calls)} == {clock.tick(t / unit)}
        pipe.scheduler.step(torch.zeros(1), t, torch.zeros(1))
    clock.tick(pipe.scheduler.timesteps[2] / unit)
    ticks = [clock.tick(t / unit) for t in values.timesteps for _ in range(calls)]
    assert ticks == [Tick(i, None, 2) for i in range(6) for _ in range(calls)]
    assert run(pipe, clock, 4)[0] == Tick(0, 4, 3)


def test_partial_run_counts_from_its_begin_index():
    pipe = Pipe(FlowMatchEulerDiscreteScheduler())
    clock = Clock(pipe)
    pipe.scheduler.set_timesteps(5)
    pipe.scheduler.set_begin_index(2)
    timesteps = pipe.scheduler.timesteps
    assert [clock.tick(timesteps[2]) for _ in range(2)] == [Tick(0, 3, 1)] * 2
    pipe.scheduler.step(torch.zeros(1), timesteps[2], torch.zeros(1))
    assert clock.tick(timesteps[3]) == Tick(1, 3, 1)


def test_scheduler_outlives_its_pipeline():
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = Pipe(scheduler)
    clock = Clock(pipe)
    del pipe
    assert run(Pipe(scheduler), clock, 3)[-1] == Tick(2, 3, 1)


def test_bare_transformer():
    clock = Clock()
    values = [9.0, 9.0, 5.0, 5.0, 1.0, 9.0, 5.0]
    ticks = [clock.tick(torch.full((2,), v)) for v in values]
    assert [t.step for t in ticks] == [0, 0, 1, 1, 2, 0, 1]
    assert [t.run for t in ticks] == [1, 1, 1, 1, 1, 2, 2]
    assert {t.total for t in ticks} == {None}


def test_timestep_per_token():
    clock = Clock()
    assert clock.tick(torch.tensor([[0.0, 9.0]])).step == 0
    assert clock.tick(torch.tensor([[0.0, 5.0]])).step == 1


def test_begin():
    clock = Clock()
    clock.tick(5.0)
    clock.begin(2)
    assert [clock.tick(t) for t in (5.0, 4.0)] == [Tick(0, 2, 2), Tick(1, 2, 2)]
    assert clock.tick(5.0) == Tick(0, None, 3)  # the next run was not announced
    for bad in (0, 2.0, True):
        with pytest.raises(ValueError, match="`steps` must be a positive integer"):
            clock.begin(bad)


def test_call_between_the_runs_of_a_pipeline():
    pipe = Pipe(FlowMatchEulerDiscreteScheduler())
    clock = Clock(pipe)
    assert clock.tick(5.0) == Tick(0, None, 1)
    run(pipe, clock, 2)
    assert clock.tick(5.0) == Tick(0, None, 3)
    assert clock.tick(4.0) == Tick(1, None, 3)
    assert run(pipe, clock, 2)[0] == Tick(0, 2, 4)
