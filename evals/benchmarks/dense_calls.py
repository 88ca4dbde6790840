"""Calls of a dense run, and how far sparse attention is from them: in one layer, and in a whole call.

All inputs are the dense run's, so that an error is the method's at that noise level and has not grown from
step to step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dit_accel.attention.call import AroundAnother, AttentionCall, LayerAttention
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Pattern
from dit_accel.pipelines.tiny.evaluate import generate
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated

from .attention import interleaved

Quantiles = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Recorded:
    """A call of a dense run: sampler step, timestep, what went in, and what came out."""

    step: int
    timestep: float
    inputs: dict[str, Any]
    prediction: torch.Tensor


def called(transformer: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """A prediction."""
    with torch.no_grad():
        return transformer(**inputs)[0]


def beside_dense(
    transformer: torch.nn.Module,
    twin: torch.nn.Module,
    inputs: dict[str, Any],
    repeats: int,
    call: Callable[[torch.nn.Module, dict[str, Any]], Any] = called,
) -> Quantiles:
    """Time of a call under a recipe as a share of a dense one's, of steps that follow each other.

    Args:
        transformer: it is enabled.
        twin: the same, which stays dense.
        repeats: timed calls of each, in turn.
        call: what is timed.
    """
    later = itertools.count()

    def next_step() -> None:
        call(transformer, {**inputs, "timestep": inputs["timestep"] - next(later)})

    dense, times = interleaved(lambda: call(twin, inputs), next_step, repeats)
    low, middle, high = (time / dense[1] for time in times)
    return low, middle, high


def record(pipe: Any, at: Sequence[int], run: dict[str, Any]) -> tuple[list[Recorded], np.ndarray]:
    """The first call at each of these steps of a dense run, and what the run gave."""
    seen: list[dict[str, Any]] = []
    found: list[Recorded] = []

    def before(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if all(kwargs["timestep"].flatten()[0] != one["timestep"].flatten()[0] for one in seen):
            seen.append({name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()})

    hook = pipe.transformer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        frames = generate(pipe, **run)
    finally:
        hook.remove()
    for step in at:
        inputs = seen[step]
        prediction = called(pipe.transformer, inputs)
        found.append(Recorded(step, float(inputs["timestep"].flatten()[0]), inputs, prediction))
    return found, frames


def call_errors(
    transformer: torch.nn.Module, recipe: Recipe, calls: Sequence[Recorded]
) -> tuple[list[float], float]:
    """||v - v_dense|| / ||v_dense|| of a recipe's prediction at each call, and the calls' block density."""
    errors = []
    with accelerated(transformer, recipe) as handle:
        for call in calls:
            prediction = called(transformer, call.inputs)
            errors.append(float((prediction - call.prediction).norm() / call.prediction.norm()))
        return errors, handle.stats()["block_density"]


def attention_error(transformer: torch.nn.Module, recipe: Recipe, calls: Sequence[Recorded]) -> float:
    """||o - o_dense|| / ||o_dense|| of the outputs of attention, mean over calls and sparse layers.

    Every layer gets the queries, keys and values of the dense run.

    Args:
        recipe: with one pattern for all layers.
    """
    errors = []
    with accelerated(transformer, replace(recipe, attention=Compared(recipe.attention))) as handle:
        for call in calls:
            called(transformer, call.inputs)
            told = handle.latest.notes["transformer"].values()
            errors += [float(said["error of attention"]) for said in told if "error of attention" in said]
    return sum(errors) / len(errors)


@dataclass(frozen=True)
class Compared(Pattern):
    """Another pattern, of which layers tell the error; what they return is the dense output."""

    base: Pattern

    @property
    def online(self) -> bool:
        return self.base.online

    def at_step(self, step: int, sigma: float | None = None, total: int | None = None) -> Pattern:
        return Compared(self.base.at_step(step, sigma, total))

    def for_head(self, layer: str | None, head: int) -> Pattern:
        return Compared(self.base.for_head(layer, head))

    def token_order(
        self, layout: TokenLayout, block_size: tuple[int, int] = (128, 64), order: Any = "auto"
    ) -> torch.Tensor:
        return self.base.token_order(layout, block_size, order)

    def layer_attention(self, heads: Sequence[Pattern], masks: LayerMasks) -> LayerAttention:
        return ComparedAttention(layer_attention([_base(one) for one in heads], masks))


def _base(pattern: Pattern) -> Pattern:
    return pattern.base if isinstance(pattern, Compared) else pattern


@dataclass(frozen=True, eq=False)
class ComparedAttention(AroundAnother):
    """Computes `inner` and the dense attention of a call, notes how they differ and returns the latter."""

    inner: LayerAttention

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        out, dense = self.inner(call), call.dense(call)
        call.notes["error of attention"] = (out - dense).norm() / dense.norm()
        return dense
