"""What a pipeline passes to its transformer: read from its own calls, for any family."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_accel.arguments import shown
from dit_accel.errors import UnavailableError
from dit_accel.pipelines.families.base import Family
from dit_accel.runtime.steps import level_of

from .nested import is_plain, mapped


class _Stopped(Exception):
    """Ends a run at the first call of its transformer."""


@dataclass(frozen=True)
class FirstCall:
    """The first call that a run makes of its transformer.

    Attributes:
        shape: of what is denoised of one sample.
        inputs: the others, of one conditional sample, tensors (1, ...) and lists of one, or as all samples
            share them; such plain values as `nested` takes.
        levels: noise levels at which the steps of the run begin, from 1 downwards.
        per_token: shape of a timestep beyond the samples: () where there is one for each.
        latents: what the run ended with, (1, *shape); None where it was stopped.
    """

    shape: tuple[int, ...]
    inputs: dict[str, Any]
    levels: tuple[float, ...]
    per_token: tuple[int, ...]
    latents: torch.Tensor | None = None


def run(pipe: Any, family: Family, call: Mapping[str, Any], to_the_end: bool) -> FirstCall:
    """Runs a pipeline on one sample and tells of its first call.

    Args:
        call: arguments of the pipeline's call.
        to_the_end: whether to make latents; else the run is stopped at that call.

    Raises:
        UnavailableError: a run that is none of a flow from pure noise, or inputs that training cannot repeat.
    """
    if family.distillation_refusal is not None:
        raise UnavailableError(
            f"models of the family {family.name!r} cannot be distilled: {family.distillation_refusal}"
        )
    seen: dict[str, Any] = {}

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not seen:
            names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
            seen.update({**dict(zip(names, args, strict=False)), **kwargs})
        if not to_the_end:
            raise _Stopped

    hook = pipe.transformer.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    with hook, _last_step(pipe.scheduler) as last, torch.no_grad(), suppress(_Stopped):
        pipe(**{**call, "output_type": "latent"})
    if not seen:
        raise RuntimeError(f"{type(pipe).__name__} never called its transformer")
    rows = family.conditional(pipe, seen)
    noisy = family.denoised(pipe.transformer, seen)[rows]
    timestep = torch.as_tensor(family.timestep(seen), device="cpu")
    if len(noisy) != 1:
        raise UnavailableError(f"{type(pipe).__name__} ran {len(noisy)} samples for one prompt")
    latents = _like(noisy, last[0], pipe) if last else None
    inputs = _others(pipe, family, seen, rows)
    shape, per_token = tuple(noisy.shape[1:]), tuple(timestep.shape[1:])
    return FirstCall(shape, inputs, _levels(pipe, family, timestep), per_token, latents)


@contextmanager
def _last_step(scheduler: Any) -> Iterator[list[torch.Tensor]]:
    """Within, the latents after the latest step of a scheduler, as its pipeline steps them, in a list."""
    own, step, last = vars(scheduler).get("step"), scheduler.step, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        last[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    scheduler.step = recorded
    try:
        yield last
    finally:
        del scheduler.step
        if own is not None:  # of the user's
            scheduler.step = own


def _like(noisy: torch.Tensor, latents: torch.Tensor, pipe: Any) -> torch.Tensor:
    """What a scheduler stepped, in the shape of what the transformer is given of it."""
    if noisy.squeeze().shape != latents.squeeze().shape:
        raise UnavailableError(
            f"{type(pipe).__name__} steps {tuple(latents.shape)} and gives its transformer "
            f"{tuple(noisy.shape)}: it is given more than noise and text, which is not supported yet"
        )
    return latents.detach().clone().view(noisy.shape)


def _others(pipe: Any, family: Family, seen: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """The inputs that training repeats, of some samples."""
    found = {}
    for name, value in seen.items():
        if name in (*family.denoised_inputs, "return_dict") or _nothing(value):
            continue
        if not is_plain(value) or name.startswith("timestep"):
            raise UnavailableError(
                f"{type(pipe).__name__} passes `{name}`={shown(value)} to its transformer, which training "
                "cannot repeat"
            )
        own = isinstance(value, torch.Tensor) and name not in family.shared_inputs
        value = value[rows] if own or name in family.listed_inputs else value
        found[name] = mapped(value, lambda x: x.detach().clone())
    return found


def _nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, Mapping) and not value)


def _levels(pipe: Any, family: Family, timestep: torch.Tensor) -> tuple[float, ...]:
    """Noise levels of the scheduler's steps, each once."""
    scheduler = pipe.scheduler
    config = scheduler.config
    levels = (scheduler.timesteps.double().cpu() / config.num_train_timesteps).tolist()
    if getattr(config, "invert_sigmas", False):
        levels = [1 - level for level in levels]
    levels = [round(level, 6) for place, level in enumerate(levels) if not place or level < levels[place - 1]]
    assert family.pure_noise is not None  # or it would be refused
    first = level_of(float(timestep.max()), family.pure_noise, family.clean)
    if not 0.9 <= levels[0] <= 1 or abs(first - levels[0]) > 0.01:
        raise UnavailableError(
            f"the {type(scheduler).__name__} of this {type(pipe).__name__} starts at {levels[0]:g} and the "
            f"transformer is asked at {first:g}; training needs a run of a flow from noise level 1"
        )
    return tuple(levels)
