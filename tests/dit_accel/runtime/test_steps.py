"""What a tracker makes of aborted runs, calls of something else, threads and copies."""

import copy
import pickle
import threading
from collections import Counter

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from sampling_loops import NAMES, SCHEDULERS, Euler, Pipe, places, run, steps_of

from dit_accel.errors import UnavailableError
from dit_accel.runtime.steps import StepTracker, Tick


def in_thread(function):
    """What a function returns when another thread calls it."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_aborted_run():
    pipe = Pipe(Euler())
    tracker = StepTracker(pipe)
    assert len(run(pipe, tracker, 5, stop=3)) == 3
    assert run(pipe, tracker, 5)[0] == Tick(0, 5, 2, 0)


def other_run(tracker, steps, scheduler, first=None, unit=1, calls=1):
    """The ticks of a pipeline that the tracker does not know."""
    scheduler.set_timesteps(steps)
    return [tracker.tick(t / unit) for t in steps_of(scheduler, first) for _ in range(calls)]


@pytest.mark.parametrize("unit", [1, 1000])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize(("others", "shift"), [(6, 3.0), (4, 3.0), (8, 3.0), (8, 1.0), (50, 12.0)])
@pytest.mark.parametrize("left", ["before a call", "in a call"])
def test_calls_after_an_aborted_run_are_not_of_it(left, others, shift, calls, unit):
    """Its scheduler stands still, so only their timesteps tell them; some of them are its own."""
    pipe = Pipe(Euler(shift=shift))
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(8)
    for t in steps_of(pipe.scheduler, stop=4):
        tracker.tick(t / unit)
    if left == "in a call":
        tracker.tick(pipe.scheduler.timesteps[4] / unit)
    ticks = other_run(tracker, others, Euler(shift=shift), unit=unit, calls=calls)
    assert ticks == [Tick(i, None, 2, i) for i in range(others) for _ in range(calls)]
    assert run(pipe, tracker, 4)[0] == Tick(0, 4, 3, 0)


def test_calls_after_a_run_that_was_aborted_in_its_first_call():
    """Another run that begins at the same value is that run, as far as one can see, but goes on by itself."""
    pipe = Pipe(Euler())
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(8)
    tracker.tick(pipe.scheduler.timesteps[0])
    assert [tick.step for tick in other_run(tracker, 5, Euler())] == [0, 1, 2, 3, 4]


class InterruptedPipe(Pipe):
    interrupt = False


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize(("steps", "first"), [(8, 4), (8, None), (4, 1), (16, 2), (16, 8)])
def test_calls_after_an_interrupted_run_are_not_of_it(steps, first, stop):
    """Not even where they begin at the very timestep at which its scheduler stands."""
    pipe = InterruptedPipe(Euler(shift=3.0))
    tracker = StepTracker(pipe)
    run(pipe, tracker, 8, 2, stop=stop)
    pipe.interrupt = True
    ticks = other_run(tracker, steps, Euler(shift=3.0), first)
    assert places(ticks) == [(i, None) for i in range(steps - (first or 0))]
    assert places(run(Pipe(pipe.scheduler), tracker, 3)) == [(0, 3), (1, 3), (2, 3)]  # as `from_pipe` has it
    pipe.interrupt = False
    assert places(run(pipe, tracker, 2)) == [(0, 2), (1, 2)]


def test_call_in_the_middle_of_a_run():
    """Such as a preview in a callback. The run goes on, with the steps that it has."""
    pipe = Pipe(Euler())
    tracker, ticks = StepTracker(pipe), []
    pipe.scheduler.set_timesteps(6)
    for t in steps_of(pipe.scheduler, 2):
        ticks.append(tracker.tick(t))
        assert tracker.tick(990.0).total is None
    assert places(ticks) == [(i, 4) for i in range(4)]
    assert len({tick.run for tick in ticks}) == 1


@pytest.mark.parametrize(
    ("says", "length", "expected"), [(True, None, (2, 5)), (False, 5, (2, 5)), (False, None, (0, 3))]
)
def test_tracker_made_in_the_middle_of_a_run(says, length, expected):
    """It counts from where it is made, unless scheduler or pipeline tell where the run began."""
    pipe = Pipe(Euler())
    if length:
        pipe.num_timesteps = length
    pipe.scheduler.set_timesteps(6)
    timesteps = steps_of(pipe.scheduler, 1, says=says)
    for _ in range(3):
        t = next(timesteps)
    tracker, (step, total) = StepTracker(pipe), expected
    assert tracker.tick(t) == Tick(step, total, 1, 0)
    assert places(tracker.tick(t) for t in timesteps) == [(step + 1, total), (step + 2, total)]


def test_scheduler_outlives_its_pipeline():
    scheduler = Euler()
    pipe = Pipe(scheduler)
    tracker = StepTracker(pipe)
    del pipe
    assert tracker.pipeline is None
    assert run(Pipe(scheduler), tracker, 3)[-1] == Tick(2, 3, 1, 2)


def test_call_between_the_runs_of_a_pipeline():
    pipe = Pipe(Euler())
    tracker = StepTracker(pipe)
    assert tracker.tick(5.0)[:3] == (0, None, 1)
    run(pipe, tracker, 2)
    assert tracker.tick(5.0)[:3] == (0, None, 3)
    assert tracker.tick(4.0)[:3] == (1, None, 3)
    assert run(pipe, tracker, 2)[0] == Tick(0, 2, 4, 0)


def test_begin():
    tracker = StepTracker()
    tracker.tick(5.0)
    tracker.begin(2)
    assert [tracker.tick(t) for t in (5.0, 4.0)] == [Tick(0, 2, 2), Tick(1, 2, 2)]
    assert tracker.tick(5.0) == Tick(0, None, 3)  # the next run was not announced
    for bad in (0, 2.0, True):
        with pytest.raises(ValueError, match="`steps` must be a positive integer"):
            tracker.begin(bad)


def test_begin_for_calls_that_a_pipeline_makes_without_its_scheduler():
    """An inversion that ends at timesteps of the schedule, which was set but does not move."""
    pipe = Pipe(Euler())
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(8)
    for _ in range(2):
        tracker.begin(8)
        ticks = [tracker.tick(torch.full((1,), i / 8)) for i in range(8)]
        assert places(ticks) == [(i, 8) for i in range(8)]
    assert places(run(pipe, tracker, 3)) == [(i, 3) for i in range(3)]


# -- threads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [8, 4, 5])
def test_threads_in_turn(others):
    """A call of the known pipeline, a call of one that is not known in another thread, and so on."""
    pipe, other = Pipe(Euler()), Euler()
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(8)
    other.set_timesteps(others)
    turns = threading.Barrier(2)

    def one_after_the_other(timesteps, begins):
        ticks = []
        for t in timesteps:
            if not begins:
                turns.wait(300)
            ticks.append(tracker.tick(t))
            if begins:
                turns.wait(300)
            turns.wait(300)
        return ticks

    known = []
    thread = threading.Thread(
        target=lambda: known.extend(one_after_the_other(steps_of(pipe.scheduler, stop=others), True))
    )
    thread.start()
    unknown = one_after_the_other(steps_of(other), False)
    thread.join()
    assert places(known) == [(i, 8) for i in range(others)]
    assert places(unknown) == [(i, None) for i in range(others)]
    assert {tick.run for tick in known}.isdisjoint(tick.run for tick in unknown)


class CalledPipe(Pipe):
    """Runs its loop in its `__call__`, as diffusers pipelines do, by which a tracker knows it."""

    transformer = None

    def __call__(self, tracker, steps, calls_per_step):
        return run(self, tracker, steps, calls_per_step)


@pytest.mark.parametrize("count", [2, 5])
def test_threads_at_once(count):
    """Each with a pipeline and scheduler of its own and other numbers of steps; one of them is the known one.

    Loops outside of a pipeline's call have their timesteps alone, which may fit where the known one stands.
    """
    pipe = CalledPipe(Euler())
    tracker, wrong = StepTracker(pipe), Counter()
    start = threading.Barrier(count)

    def work(i):
        own = pipe if i == 0 else CalledPipe(Euler(shift=1.0 + i))
        start.wait(300)
        for steps in (4 + i, 9, 3 + 2 * i):
            ticks = own(tracker, steps, 2)
            expected = [step for step in range(steps) for _ in range(2)]
            wrong[i] += [tick.step for tick in ticks] != expected or len({tick.run for tick in ticks}) > 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == dict.fromkeys(range(count), 0)


def test_begin_is_for_the_thread_that_calls_it():
    tracker = StepTracker()
    tracker.begin(4)
    assert in_thread(lambda: tracker.tick(5.0)) == Tick(0, None, 1)
    assert tracker.tick(5.0) == Tick(0, 4, 2)
    assert in_thread(lambda: tracker.evaluation) is None


def test_pipeline_that_goes_from_thread_to_thread():
    """Each run in another one, as a server has it."""
    pipe = Pipe(Euler())
    tracker = StepTracker(pipe)
    for steps in (3, 3, 5):
        assert places(in_thread(lambda n=steps: run(pipe, tracker, n))) == [(i, steps) for i in range(steps)]
    assert places(run(pipe, tracker, 2)) == [(0, 2), (1, 2)]


# -- copies and devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_belongs_to_no_pipeline(copied):
    pipe = Pipe(Euler())
    tracker = StepTracker(pipe)
    run(pipe, tracker, 3, stop=2)
    other = copied(tracker)
    assert (other.pipeline, other.evaluation) == (None, None)
    assert other.tick(pipe.scheduler.timesteps[1]) == Tick(0, None, 1)
    assert tracker.tick(pipe.scheduler.timesteps[2]) == Tick(2, 3, 1, 2)


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what a GPU has to be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default,)
        return function(*args, **(kwargs or {}))


def test_one_read_of_the_device_in_a_step():
    """Where guidance branches share one tensor, as in diffusers' loops for Wan and HunyuanVideo."""
    pipe = Pipe(Euler())
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(4)
    for i, t in enumerate(steps_of(pipe.scheduler)):
        timestep = t.expand(2)
        with Reads() as reads:
            assert {tracker.tick(timestep)[:2] for _ in range(2)} == {(i, 4)}
        assert reads.count == 1 or i == 0


# -- noise levels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [None, 1, 2])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("make", SCHEDULERS[:-1], ids=NAMES[:-1])
def test_noise_level_is_where_the_scheduler_stands(make, calls, first):
    """Also of schedules of which only a part is run, whose timesteps are rounded."""
    pipe, seen = Pipe(make()), []
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(5)
    for t in steps_of(pipe.scheduler, first):
        for _ in range(calls):
            tracker.tick(t.expand(2))
            seen.append(tracker.noise_level(None))
    expected = [s for s in pipe.scheduler.sigmas[first:-1].tolist() for _ in range(calls)]
    assert seen == pytest.approx(expected, abs=1e-6)


def test_noise_level_of_a_step_of_two_evaluations():
    """Is one: that with which the step begins."""
    pipe, seen = Pipe(FlowMatchHeunDiscreteScheduler(shift=5.0)), []
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(4)
    for t in steps_of(pipe.scheduler):
        tick = tracker.tick(t)
        seen.append((tick.step, tracker.noise_level(1000)))
    levels = pipe.scheduler.sigmas[:-1:2].tolist()
    assert seen == [(i, pytest.approx(s, abs=1e-6)) for i, s in enumerate(levels) for _ in (0, 1)][:-1]


@pytest.mark.parametrize(("unit", "timesteps"), [(1000.0, (1000, 750.0, 1)), (1.0, (1.0, 0.75, 0.001))])
def test_noise_level_of_a_bare_transformer_is_its_timestep(unit, timesteps):
    """Of one for each token, the noisiest."""
    tracker = StepTracker()
    for t, level in zip(timesteps, (1.0, 0.75, 0.001), strict=True):
        tracker.tick(torch.tensor([[0.0, t]]))
        assert tracker.noise_level(unit) == level


def test_no_noise_level():
    tracker = StepTracker()
    tracker.tick(1000.0)
    with pytest.raises(UnavailableError, match="those of this one are not known; enable it on its pipeline"):
        tracker.noise_level(None)
    with pytest.raises(ValueError, match=r"timestep 1000 is no noise level of a flow: .* 0 to 1, which"):
        tracker.noise_level(1.0)
    pipe = Pipe(SCHEDULERS[-1]())
    tracker = StepTracker(pipe)
    run(pipe, tracker, 2)
    with pytest.raises(
        UnavailableError, match=r"scheduler of flows, .* got EulerDiscreteScheduler; name steps"
    ):
        tracker.noise_level(1000.0)
