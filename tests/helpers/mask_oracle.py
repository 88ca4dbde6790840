"""An oracle for accelerated calls: the transformer's own attention under dense masks, in fp32 and in fp64."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from diffusers import CogVideoXDDIMScheduler

from dit_accel import TokenLayout
from dit_accel.attention import online
from dit_accel.layer_names import flat_indices
from dit_accel.patterns import Pattern, SparseVideoGen
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated

PatternOf = Callable[[int, int], Pattern]  # by layer (flat index) and head


class Call(NamedTuple):
    """One call of an accelerated transformer: its sampler step, its inputs, the sample it returned.

    By layer, `temporal` is which heads are, bool (B, H), and `chosen` what heads that choose blocks attend
    to, bool (B, heads that do, S, S). `sigma` is the noise level at which the step began.
    """

    step: int
    inputs: dict
    output: torch.Tensor
    temporal: dict[str, torch.Tensor | None]
    chosen: dict[str, torch.Tensor]
    sigma: float | None  # None: of no flow


def recorded(pipe, recipe: Recipe, drive: Callable) -> list[Call]:
    """The calls that the transformer gets while `drive(pipe)` runs under a recipe."""
    inputs, calls, pure_noise = [], [], family_of(pipe.transformer).pure_noise

    def before(module, args, kwargs):
        names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
        inputs.append({**dict(zip(names, args, strict=False)), **kwargs})

    def after(module, args, output):
        notes = handle.latest.notes.get("transformer", {})
        of = {kind: {n: said[kind] for n, said in notes.items() if kind in said} for kind in told}
        sigma = None if no_flow else handle.steps.noise_level(pure_noise)
        calls.append(Call(handle.step, inputs[-1], stacked(output[0]), *of.values(), sigma))

    def tell(call, mask):
        tokens = call.q.shape[2]  # some masks have places behind them, where cubes are cut
        call.notes["chosen"] = mask.to_token_mask()[..., :tokens, :tokens]

    told, no_flow = ("temporal heads", "chosen"), isinstance(pipe.scheduler, CogVideoXDDIMScheduler)
    with (
        mock.patch.object(online, "tell", tell),
        accelerated(pipe, recipe) as handle,
        pipe.transformer.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        pipe.transformer.register_forward_hook(after),
        torch.no_grad(),
    ):
        drive(pipe)
    return calls


def stacked(sample: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """A forward's sample, of Z-Image a list."""
    return sample if isinstance(sample, torch.Tensor) else torch.stack(sample)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return (actual - exact).abs().max().item()


def same(a: Any, b: Any) -> bool:
    """Whether two inputs are of one type and equal in every value."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b


class Oracle:
    """The same transformer with diffusers' own attention under dense masks, in fp32 and in fp64."""

    def __init__(self, transformer, masked):
        self.family = family_of(transformer)
        self.plain, self.exact = copy.deepcopy(transformer), copy.deepcopy(transformer).double()
        for model in (self.plain, self.exact):
            layers = self.family.layers(model)
            masked(layers, dict.fromkeys(layers, torch.ones(1, 1, 1, 1, dtype=torch.bool)))
        self._dense: list[tuple[dict, torch.Tensor]] = []  # inputs, which most patterns get alike

    def check(self, call: Call, grid: tuple[int, ...], pattern_of: PatternOf, anchor=None) -> None:
        """The fp64 rule; and that a call without the masks would break it."""
        masks = self._masks(call, grid, pattern_of, anchor)
        exact, plain = (self._predict(model, call.inputs, masks) for model in (self.exact, self.plain))
        dense = self._predict_dense(call.inputs, masks)
        rounding = torch.finfo(plain.dtype).eps * exact.abs().max().item()
        tolerance = 2 * error(plain, exact) + 4 * rounding  # other processors round otherwise
        assert error(call.output, exact) <= tolerance
        assert error(dense, exact) > 100 * tolerance

    def _masks(self, call: Call, grid, pattern_of: PatternOf, anchor) -> dict[str, torch.Tensor]:
        """Token masks by layer, bool (B or 1, H, S, S)."""
        layout = self.family.layout(self.plain, call.inputs, {})  # of text, each family's own tests say it
        own = self.family.planned_layout((1, *grid)[-3:], 0)
        assert (layout.grid, layout.anchor) == (own.grid, anchor or own.anchor)
        names, heads = list(self.family.layers(self.plain)), range(self.family.heads(self.plain)[0])
        masks = {}
        for name, index in zip(names, flat_indices(names), strict=True):
            own = dataclasses.replace(layout, text_len=0) if name.endswith("attn2") else layout
            temporal, chosen = call.temporal.get(name), call.chosen.get(name)
            samples = [[None] * len(heads)] if temporal is None else temporal.tolist()
            patterns = [pattern_of(index, h).at_step(call.step, call.sigma) for h in heads]
            if chosen is None:
                rows = [[token_mask(patterns[h], own, sample[h]) for h in heads] for sample in samples]
                masks[name] = torch.stack([torch.stack(row) for row in rows])
            else:
                mine = iter(chosen.unbind(1))
                rows = [
                    next(mine) if p.online else p.token_mask(own).expand_as(chosen[:, 0]) for p in patterns
                ]
                masks[name] = torch.stack(rows, 1)
        return masks

    def _predict_dense(self, inputs: dict, masks: dict[str, torch.Tensor]) -> torch.Tensor:
        for others, dense in self._dense:
            if same(inputs, others):
                return dense
        everything = {name: torch.ones_like(mask) for name, mask in masks.items()}
        self._dense.append((inputs, self._predict(self.plain, inputs, everything)))
        return self._dense[-1][1]

    @torch.no_grad()
    def _predict(self, model, inputs: dict, masks: dict[str, torch.Tensor]) -> torch.Tensor:
        for name, layer in self.family.layers(model).items():
            layer.processor.mask = masks[name]

        dtype = model.dtype  # which diffusers looks for in all modules

        def cast(x):
            if isinstance(x, list):
                return [cast(item) for item in x]
            return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        return stacked(model(**{name: cast(x) for name, x in inputs.items()})[0])


def token_mask(pattern: Pattern, layout: TokenLayout, temporal: bool | None) -> torch.Tensor:
    """Of one head, `temporal` being what it chose if it did."""
    if isinstance(pattern, SparseVideoGen):
        pattern = pattern.temporal if temporal else pattern.spatial
    return pattern.token_mask(layout)
