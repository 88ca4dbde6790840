"""Switching a recipe on and off, for one pipeline or transformer instance."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel.attention import transformer_call
from dit_accel.bounded_dict import make_room
from dit_accel.errors import UnavailableError
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Pattern
from dit_accel.pipelines.families import family_of
from dit_accel.pipelines.families.generic import Generic
from dit_accel.recipe.adapter import TRANSFORMERS
from dit_accel.recipe.adapter_parts import Part
from dit_accel.recipe.recipe import Recipe, resolve

from .binding import Binding
from .run_record import RunRecord
from .steps import StepTracker, Tick

_HANDLE = "_dit_accel_handle"
_RUNS_KEPT = 8


class Handle:
    """An enabled recipe: its recipe, what it did in the latest run, and the way to switch it off.

    Attributes:
        recipe: the `Recipe`.
        bindings: one per transformer, by the pipeline's name for it.
        step, total_steps: sampler step of the latest call, from 0, and steps of its run (None: not known).
    """

    def __init__(self, recipe: Recipe, bindings: dict[str, Binding], steps: StepTracker):
        self.recipe, self.bindings, self.steps = recipe, bindings, steps
        self.step: int | None = None
        self.total_steps: int | None = None
        self._records: dict[int, RunRecord] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy has made no runs yet."""
        return {**vars(self), "step": None, "total_steps": None, "_records": {}}

    @property
    def transformers(self) -> list[nn.Module]:
        """The transformers it was made for."""
        return [binding.transformer for binding in self.bindings.values()]

    @property
    def active(self) -> bool:
        """Whether it is still enabled."""
        return self in _handles(self.transformers)

    @property
    def latest(self) -> RunRecord:
        """What the latest run did; without calls before one."""
        return next(reversed(self._records.values()), RunRecord(run=0))

    @property
    def run_density(self) -> float | None:
        """Computed share of all pairs in the latest run, dense layers and steps included; None before one."""
        return self.latest.density

    @property
    def run_block_density(self) -> float | None:
        """The same in whole blocks: what a block-sparse kernel pays."""
        return self.latest.block_density

    def stats(self) -> dict[str, Any]:
        """What the latest run did, as plain data.

        `step_densities` is by sampler step; `temporal_heads` is what heads of `SparseVideoGen` last chose,
        the share of temporal ones by layer;
        `guidance` what the perturbed branch ran, by transformer; `sent_bytes` what attention sent to other
        processes under context parallelism.
        """
        latest = self.latest
        temporal = {name: latest.temporal_heads(name) for name in self.bindings}
        return {
            "recipe": self.recipe.tag,
            "calls": latest.calls,
            "steps": latest.steps,
            "dense_steps": sorted(latest.dense_steps),
            "density": latest.density,
            "block_density": latest.block_density,
            "step_densities": latest.step_densities,
            "grids": dict(latest.grids),
            "sent_bytes": latest.sent_bytes,
            "temporal_heads": {name: shares for name, shares in temporal.items() if shares},
            "guidance": {
                name: {"forwards": run.forwards, "blocks": run.blocks, "cost": binding.branch.cost}
                for name, binding in self.bindings.items()
                if binding.branch is not None
                for run in [binding.branch.run(latest.run)]
            },
        }

    def token_order(self, transformer: str = "transformer") -> torch.Tensor | None:
        """Which visual token stands at each place inside a transformer, int64 (V,), in its call.

        In a hook that of the call that the hook is in, otherwise of the latest sparse one.

        Sparse patterns are fastest where tokens that attend to each other are neighbours, so that visual
        tokens are moved where they enter the transformer, and back where they leave it. Hooks of your own on
        its blocks see them moved: `features[:, torch.argsort(order)]` brings visual features into the model's
        row-major order. None: tokens stand there (always so with `Recipe(..., order="raster")`).
        """
        binding = self.bindings[transformer]
        call = transformer_call.current(binding)
        if call is not None:
            return call.geometry.permutation if call.moved else None
        return None if binding.geometry is None else binding.geometry.permutation

    def begin(self, steps: int) -> None:
        """Announce a run of a bare transformer; fractional and negative `dense_steps` need it."""
        self.steps.begin(steps)

    def disable(self) -> None:
        """Restore every transformer of this handle. Does nothing the second time."""
        for binding in self.bindings.values():
            if getattr(binding.transformer, _HANDLE, None) is self:
                binding.detach()
                delattr(binding.transformer, _HANDLE)

    def _attach(self) -> None:
        for binding in self.bindings.values():
            binding.record = self._record
            setattr(binding.transformer, _HANDLE, self)
            binding.attach()

    def _record(self, tick: Tick) -> RunRecord:
        """That of the run of a call."""
        self.step, self.total_steps = tick.step, tick.total
        if tick.run not in self._records:
            make_room(self._records, _RUNS_KEPT)
            self._records[tick.run] = RunRecord(tick.run)
        return self._records[tick.run]

    def __repr__(self) -> str:
        where = ", ".join(f"{name}: {type(b.transformer).__name__}" for name, b in self.bindings.items())
        return f"Handle({where}, {'enabled' if self.active else 'disabled'}, {self.recipe!r})"


def enable(
    target: Any,
    recipe: Recipe | Pattern | str | Path,
    *,
    layout: TokenLayout | Callable[[dict[str, Any]], TokenLayout] | None = None,
) -> Handle:
    """Accelerate the attention of one pipeline or transformer.

    Args:
        target: a diffusers pipeline (all its transformers are handled as one) or a bare transformer.
        recipe: a `Recipe`, a preset's name (`dit_accel.presets()`), the path of a YAML or JSON file, or just
            a pattern.
        layout: for a transformer of no known family, where its tokens are: a `TokenLayout`, or a function
            from the inputs of its forward, by name, to one. Layers that attend to that many tokens by
            diffusers' `dispatch_attention_fn` are accelerated.

    Returns:
        The handle. Enabling again restores first. Nothing is changed when an error is raised.

    Raises:
        ValueError: an unknown preset, a recipe of another family, selectors that match no layer, or an
            adapter that was made for another model.
        UnavailableError: a backend or option that cannot run here.
        TypeError: a target that is not a supported pipeline or transformer.
    """
    recipe = resolve(recipe)
    transformers = transformers_of(target)
    steps = StepTracker(None if isinstance(target, nn.Module) else target)
    previous, handle = _handles(transformers.values()), None
    try:
        # the old processors come off while the new recipe is checked, and back if it fails
        for earlier in previous:
            earlier.disable()
        parts = {} if recipe.adapter is None else recipe.adapter.parts_of(tuple(transformers))
        bindings = {
            name: _bind(target, name, t, recipe, steps, layout, parts.get(name))
            for name, t in transformers.items()
        }
        _check_pag(target, bindings)
        handle = Handle(recipe, bindings, steps)
        handle._attach()
    except BaseException:
        if handle is not None:
            handle.disable()
        for earlier in previous:
            earlier.disable()
            earlier._attach()
        raise
    return handle


def disable(target: Any) -> None:
    """Restore the original attention of a pipeline or transformer, bit for bit; idempotent."""
    for handle in _handles(transformers_of(target).values()):
        handle.disable()


@contextmanager
def accelerated(
    target: Any,
    recipe: Recipe | Pattern | str | Path,
    *,
    layout: TokenLayout | Callable[[dict[str, Any]], TokenLayout] | None = None,
) -> Iterator[Handle]:
    """`enable` for the length of a `with` block; what was enabled before is enabled again after it."""
    transformers = list(transformers_of(target).values())
    before = _handles(transformers)
    handle = enable(target, recipe, layout=layout)
    try:
        yield handle
    finally:
        # those of the target and, as an earlier handle may be of more, all that will be enabled again
        for other in _handles([*transformers, *(t for earlier in before for t in earlier.transformers)]):
            other.disable()
        for earlier in before:
            earlier._attach()


def handle_of(target: Any) -> Handle | None:
    """The handle of an enabled pipeline or transformer, or None."""
    return next(iter(_handles(transformers_of(target).values())), None)


def _handles(transformers: Iterable[nn.Module]) -> list[Handle]:
    """The handles that are enabled on transformers, each once."""
    found = (getattr(transformer, _HANDLE, None) for transformer in transformers)
    return list(dict.fromkeys(handle for handle in found if handle is not None))


def _bind(
    target: Any,
    name: str,
    transformer: nn.Module,
    recipe: Recipe,
    steps: StepTracker,
    layout: Any,
    adapter: Part | None,
) -> Binding:
    family = family_of(transformer) if layout is None else Generic(layout)
    recipe.check_family(family.name, f"this is a {family.name} transformer")
    device = _execution_device(target, transformer)
    return Binding(transformer, family, recipe, steps, device, name=name, adapter=adapter)


def _check_pag(target: Any, bindings: dict[str, Binding]) -> None:
    """Pipelines with diffusers' perturbed attention guidance replace processors in every call."""
    applied = getattr(target, "pag_applied_layers", None) or []
    for binding in bindings.values():
        places = {module: name for name, module in binding.transformer.named_modules()}
        for layer in binding.patched_layers:
            place = places[binding.modules[layer]]
            if any(re.search(one, place) for one in applied):
                raise UnavailableError(
                    f"{type(target).__name__} replaces the attention processor of {place} in every call, as "
                    f"its `pag_applied_layers` {applied} say; make these layers dense ({layer!r} here), or "
                    "use `Recipe(guidance=HeadPerturbation(..., kind='pag'))` in the pipeline without PAG"
                )


def _execution_device(target: Any, transformer: Any) -> torch.device:
    """Where a transformer runs, which differs from where its weights are while they are offloaded."""
    device = getattr(target, "_execution_device", None)  # a pipeline's
    if isinstance(device, torch.device):
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in transformer.modules())  # accelerate's
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in devices if device is not None), None)
    return transformer.device if device is None else torch.device(device)


def transformers_of(target: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline, or the transformer itself, out of their wrappers."""
    if isinstance(target, nn.Module):
        found = {"transformer": target}
    else:
        found = {name: getattr(target, name, None) for name in TRANSFORMERS}
    found = {name: _unwrapped(module) for name, module in found.items() if isinstance(module, nn.Module)}
    if not found:
        raise TypeError(
            f"expected a diffusers pipeline with a transformer, or a transformer, got {type(target).__name__}"
        )
    return found


def _unwrapped(module: nn.Module) -> nn.Module:
    """A module out of `torch.compile`, PEFT's and distributed wrappers.

    Raises:
        TypeError: `DataParallel`, which runs copies that would not be accelerated.
    """
    if isinstance(module, nn.DataParallel):
        raise TypeError(
            "DataParallel runs copies of the transformer that are made in every call; pass its `.module`, "
            "one for each process (`accelerate launch`)"
        )
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return _unwrapped(module.module)
    if any(cls.__name__ == "PeftModel" for cls in type(module).__mro__):
        return _unwrapped(module.get_base_model())
    return getattr(module, "_orig_mod", module)
