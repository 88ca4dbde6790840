"""Sampling loops as diffusers pipelines write them, around its schedulers."""

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

Euler = FlowMatchEulerDiscreteScheduler


def flow_unipc():
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def flow_dpm():
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


SCHEDULERS = [Euler, lambda: Euler(shift=12.0), flow_unipc, flow_dpm, EulerDiscreteScheduler]
NAMES = ["euler", "euler shifted", "unipc", "dpm", "euler of sigmas"]


class Pipe:
    def __init__(self, scheduler):
        self.scheduler = scheduler


def steps_of(scheduler, first=None, stop=None, says=False):
    """The timesteps of a pipeline's loop over a schedule from a place on, each stepped after its use."""
    if says:
        scheduler.set_begin_index(first)
    sample = torch.zeros(1, 4, 2, 2)
    for i, t in enumerate(scheduler.timesteps[first:]):
        if i == stop:
            return
        yield t
        sample = scheduler.step(sample, t, sample).prev_sample


def run(pipe, tracker, steps, calls_per_step=1, first=None, stop=None, says=False):
    """The ticks of a pipeline's loop."""
    pipe.scheduler.set_timesteps(steps)
    timesteps = steps_of(pipe.scheduler, first, stop, says)
    return [tracker.tick(t.expand(2)) for t in timesteps for _ in range(calls_per_step)]


def places(ticks):
    return [tick[:2] for tick in ticks]
