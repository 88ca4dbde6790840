"""What a pipeline passes to its transformer: read from its own calls, for any family."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_accel.arguments import shown
from dit_accel.errors import UnavailableError
from dit_accel.pipelines.families.base import Family

OWN = ("hidden_states", "timestep", "return_dict")  # inputs of a transformer that training makes itself


class _Stopped(Exception):
    """Ends a run at the first call of its transformer."""


@dataclass(frozen=True)
class FirstCall:
    """The first call that a run makes of its transformer.

    Attributes:
        shape: of one sample's `hidden_states`.
        inputs: the other tensors, of one conditional sample, (1, ...), or as all samples share them.
        levels: noise levels at which the steps of the run begin, from 1 downwards.
        per_token: shape of a timestep beyond the samples: () where there is one for each.
        latents: what the run ended with, like `hidden_states`; None where it was stopped.
    """

    shape: tuple[int, ...]
    inputs: dict[str, torch.Tensor]
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
    seen: dict[str, Any] = {}

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not seen:
            names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
            seen.update({**dict(zip(names, args, strict=False)), **kwargs})
        if not to_the_end:
            raise _Stopped

    latents = None
    with pipe.transformer.register_forward_pre_hook(before, with_kwargs=True, prepend=True), torch.no_grad():
        try:
            result = pipe(**{**call, "output_type": "latent"})
            latents = result.frames if hasattr(result, "frames") else result.images
        except _Stopped:
            pass
    if not seen:
        raise RuntimeError(f"{type(pipe).__name__} never called its transformer")
    rows = family.conditional(pipe, seen)
    noisy, timestep = seen["hidden_states"][rows], torch.as_tensor(seen["timestep"])
    found = {
        name: value if name in family.shared_inputs else value[rows]
        for name, value in seen.items()
        if name not in OWN and not _nothing(value) and _is_tensor(pipe, name, value)
    }
    if len(noisy) != 1:
        raise UnavailableError(f"{type(pipe).__name__} ran {len(noisy)} samples for one prompt")
    if latents is not None and latents.shape != noisy.shape:
        raise UnavailableError(
            f"{type(pipe).__name__} denoises {tuple(noisy.shape)} and returns {tuple(latents.shape)}: it is "
            "given more than noise and text, which is not supported yet"
        )
    first = {"inputs": {n: x.detach().clone() for n, x in found.items()}, "latents": latents}
    shapes = tuple(noisy.shape[1:]), tuple(timestep.shape[1:])
    return FirstCall(shapes[0], levels=_levels(pipe, family, timestep), per_token=shapes[1], **first)


def _nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, Mapping) and not value)


def _is_tensor(pipe: Any, name: str, value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    raise UnavailableError(
        f"{type(pipe).__name__} passes `{name}`={shown(value)} to its transformer, which training cannot "
        "repeat"
    )


def _levels(pipe: Any, family: Family, timestep: torch.Tensor) -> tuple[float, ...]:
    """Noise levels of the scheduler's steps, each once."""
    scheduler = pipe.scheduler
    if not family.pure_noise:
        raise UnavailableError(
            f"distillation needs timesteps that fall from pure noise to 0, which those of the family "
            f"{family.name!r} do not"
        )
    total = scheduler.config.num_train_timesteps
    levels = (scheduler.timesteps.double().cpu() / total).tolist()
    levels = [round(level, 6) for place, level in enumerate(levels) if not place or level < levels[place - 1]]
    first = float(timestep.max()) / family.pure_noise
    if not 0.9 <= levels[0] <= 1 or abs(first - levels[0]) > 0.01:
        raise UnavailableError(
            f"the {type(scheduler).__name__} of this {type(pipe).__name__} starts at {levels[0]:g} and the "
            f"transformer is asked at {first:g}; training needs a run of a flow from noise level 1"
        )
    return tuple(levels)
