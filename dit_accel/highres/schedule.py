"""A part of a pipeline's noise schedule, with each step's prediction in the hands of a method."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch

from dit_accel.errors import UnavailableError

# (prediction, latents, noise level, step from 0, steps) -> prediction; of shape (B, C, [F,] H, W)
OnStep = Callable[[torch.Tensor, torch.Tensor, float, int, int], torch.Tensor]


@dataclass(frozen=True)
class Part:
    """Steps `first` to `last` - 1 of a schedule of `steps`; where it stops early, with the clean estimate.

    Attributes:
        shift: of the schedule, a factor; None: the pipeline's own, whole schedule.
    """

    steps: int
    first: int = 0
    last: int | None = None
    shift: float | None = None

    @property
    def count(self) -> int:
        """Steps that are executed."""
        return (self.steps if self.last is None else self.last) - self.first


def check_flow(scheduler: Any) -> None:
    """Raise UnavailableError unless a scheduler is a flow's and makes one step for each timestep."""
    config = scheduler.config
    flow = "flow" in type(scheduler).__name__.lower() or config.get("use_flow_sigmas", False)
    if not flow or getattr(scheduler, "order", 1) != 1:
        raise UnavailableError(
            f"re-noising needs a scheduler of flows with one evaluation for each step, such as "
            f"FlowMatchEulerDiscreteScheduler, got {type(scheduler).__name__}"
        )


def own_shift(config: Any, tokens: int) -> float:
    """The factor by which a scheduler shifts the noise levels of a call with so many visual tokens."""
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", config.get("flow_shift", 1.0)))
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = base + (most - base) * (tokens - low) / (high - low)
    return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)


def shifted(scheduler: Any, shift: float | None) -> Any:
    """A scheduler like another, with a shift that does not depend on size; None: with the same."""
    if shift is None:
        return type(scheduler).from_config(scheduler.config)
    name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
    return type(scheduler).from_config(scheduler.config, **{name: shift, "use_dynamic_shifting": False})


def explicit_sigmas(pipe: Any, steps: int) -> list[float] | None:
    """The noise levels before the shift that a pipeline is to be given, or None where it takes none."""
    takes = "sigmas" in inspect.signature(pipe.__call__).parameters
    if not takes or pipe.scheduler.config.get("use_flow_sigmas", False):
        return None
    return np.linspace(1, 1 / steps, steps).tolist()


def first_level(pipe: Any, part: Part) -> float:
    """The noise level at which a part of a schedule begins."""
    scheduler, sigmas = shifted(pipe.scheduler, part.shift), explicit_sigmas(pipe, part.steps)
    if sigmas is None:
        scheduler.set_timesteps(part.steps, device="cpu")
    else:
        scheduler.set_timesteps(sigmas=sigmas, device="cpu")
    return float(scheduler.sigmas[part.first])


@contextmanager
def scheduled(pipe: Any, part: Part, on_step: OnStep | None, unpack: Any) -> Iterator[dict[str, Any]]:
    """A pipeline runs this part of its schedule, for the length of a `with` block.

    Args:
        on_step: what makes of each prediction another one; None: it stays.
        unpack: (tokens or latents) -> (latents, function back).

    Yields:
        Arguments of the pipeline's call.
    """
    original = pipe.scheduler
    sigmas = None if part.shift is None else explicit_sigmas(pipe, part.steps)
    scheduler = shifted(original, part.shift)
    set_timesteps, step, last = scheduler.set_timesteps, scheduler.step, part.first + part.count

    @wraps(set_timesteps)
    def cut(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        stops_early = last < len(scheduler.timesteps)
        scheduler.timesteps = scheduler.timesteps[part.first : last]
        scheduler.sigmas = scheduler.sigmas[part.first : last + 1].clone()
        scheduler.num_inference_steps = len(scheduler.timesteps)
        if stops_early:
            scheduler.sigmas[-1] = 0.0  # a step to the clean estimate

    @wraps(step)
    def guided(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any):
        index = scheduler.step_index or 0
        assert on_step is not None  # it is put in only then
        prediction, back = unpack(model_output)
        level = float(scheduler.sigmas[index])
        changed = on_step(prediction.float(), unpack(sample)[0].float(), level, index, part.count)
        return step(back(changed.to(model_output.dtype)), timestep, sample, *args, **kwargs)

    scheduler.set_timesteps = cut
    if on_step is not None:
        scheduler.step = guided
    pipe.scheduler = scheduler
    try:
        yield {} if sigmas is None else {"sigmas": sigmas}
    finally:
        pipe.scheduler = original
