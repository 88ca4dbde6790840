"""Switching a recipe on and off, for one pipeline or transformer instance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .binding import Binding
from .clock import Clock, Tick
from .errors import UnavailableError
from .geometry import Geometry
from .patterns import Pattern
from .pipelines import family_of
from .recipe import Recipe, resolve

_HANDLE = "_dit_accel_handle"
_TRANSFORMERS = ("transformer", "transformer_2")


class Handle:
    """An enabled recipe: its recipe, what it did in the latest run, and the way to switch it off.

    Attributes:
        recipe: the `Recipe`.
        bindings: one per transformer, by the pipeline's name for it.
        step, total_steps: sampler step of the latest call, from 0, and steps of its run (None: not known).
    """

    def __init__(self, recipe: Recipe, bindings: dict[str, Binding], clock: Clock):
        self.recipe, self.bindings, self.clock = recipe, bindings, clock
        self.step: int | None = None
        self.total_steps: int | None = None
        self._run: int | None = None
        self._calls = 0
        self._density = self._block_density = 0.0
        self._dense_steps: set[int] = set()

    @property
    def transformers(self) -> list[nn.Module]:
        """The transformers it was made for."""
        return [binding.transformer for binding in self.bindings.values()]

    @property
    def active(self) -> bool:
        """Whether it is still enabled."""
        return self in _handles(self.transformers)

    @property
    def run_density(self) -> float | None:
        """Computed share of all pairs in the latest run, dense layers and steps included; None before one."""
        return self._density / self._calls if self._calls else None

    @property
    def run_block_density(self) -> float | None:
        """The same in whole blocks: what a block-sparse kernel pays."""
        return self._block_density / self._calls if self._calls else None

    def stats(self) -> dict[str, Any]:
        """What the latest run did, as plain data.

        `temporal_heads` is what heads of `SparseVideoGen` last chose, the share of temporal ones by layer;
        `guidance` what the perturbed branch ran, by transformer.
        """
        bindings = {name: b for name, b in self.bindings.items() if b.geometry is not None}
        temporal = {name: b.temporal_heads() for name, b in bindings.items()}
        return {
            "recipe": self.recipe.tag,
            "calls": self._calls,
            "steps": self.total_steps,
            "dense_steps": sorted(self._dense_steps),
            "density": self.run_density,
            "block_density": self.run_block_density,
            "grids": {name: b.geometry.layout.grid for name, b in bindings.items()},
            "temporal_heads": {name: shares for name, shares in temporal.items() if shares},
            "guidance": {
                name: {"forwards": b.branch.calls, "blocks": b.branch.blocks, "cost": b.branch.cost}
                for name, b in self.bindings.items()
                if b.branch is not None
            },
        }

    def begin(self, steps: int) -> None:
        """Announce a run of a bare transformer; fractional and negative `dense_steps` need it."""
        self.clock.begin(steps)

    def disable(self) -> None:
        """Restore every transformer of this handle. Does nothing the second time."""
        for binding in self.bindings.values():
            if getattr(binding.transformer, _HANDLE, None) is self:
                binding.detach()
                delattr(binding.transformer, _HANDLE)

    def _attach(self) -> None:
        for binding in self.bindings.values():
            binding.tally = self._tally
            binding.attach()
            setattr(binding.transformer, _HANDLE, self)

    def _tally(self, tick: Tick, dense: bool, geometry: Geometry | None) -> None:
        if tick.run != self._run:
            self._run = tick.run
            self._calls, self._density, self._block_density, self._dense_steps = 0, 0.0, 0.0, set()
        self.step, self.total_steps = tick.step, tick.total
        self._calls += 1
        if dense or geometry is None:
            self._density += 1
            self._block_density += 1
            self._dense_steps.add(tick.step)
        else:
            self._density += geometry.over_layers(geometry.densities)
            self._block_density += geometry.over_layers(geometry.block_densities)

    def __repr__(self) -> str:
        where = ", ".join(f"{name}: {type(b.transformer).__name__}" for name, b in self.bindings.items())
        return f"Handle({where}, {'enabled' if self.active else 'disabled'}, {self.recipe!r})"


def enable(target: Any, recipe: Recipe | Pattern | str | Path) -> Handle:
    """Accelerate the attention of one pipeline or transformer.

    Args:
        target: a diffusers pipeline (all its transformers are handled as one) or a bare transformer.
        recipe: a `Recipe`, a preset's name (`dit_accel.presets()`), the path of a YAML or JSON file, or just
            a pattern.

    Returns:
        The handle. Enabling again restores first. Nothing is changed when an error is raised.

    Raises:
        ValueError: an unknown preset, a recipe of another family, or selectors that match no layer.
        UnavailableError: a backend or option that cannot run here.
        TypeError: a target that is not a supported pipeline or transformer.
    """
    recipe = resolve(recipe)
    if recipe.quantization is not None:
        raise UnavailableError(
            f"`quantization` is not available in this version, got {recipe.quantization!r}; "
            "use quantization=None"
        )
    transformers = _transformers(target)
    clock = Clock(None if isinstance(target, nn.Module) else target)
    previous = _handles(transformers.values())
    # The old processors come off while the new recipe is checked, and back if it fails.
    for handle in previous:
        handle.disable()
    try:
        bindings = {name: _bind(target, t, recipe, clock) for name, t in transformers.items()}
    except Exception:
        for handle in previous:
            handle._attach()
        raise
    handle = Handle(recipe, bindings, clock)
    handle._attach()
    return handle


def disable(target: Any) -> None:
    """Restore the original attention of a pipeline or transformer, bit for bit; idempotent."""
    for handle in _handles(_transformers(target).values()):
        handle.disable()


@contextmanager
def accelerated(target: Any, recipe: Recipe | Pattern | str | Path) -> Iterator[Handle]:
    """`enable` for the length of a `with` block; what was enabled before is enabled again after it."""
    transformers = list(_transformers(target).values())
    before = _handles(transformers)
    handle = enable(target, recipe)
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
    return next(iter(_handles(_transformers(target).values())), None)


def _handles(transformers: Iterable[nn.Module]) -> list[Handle]:
    """The handles that are enabled on transformers, each once."""
    found = (getattr(transformer, _HANDLE, None) for transformer in transformers)
    return list(dict.fromkeys(handle for handle in found if handle is not None))


def _bind(target: Any, transformer: nn.Module, recipe: Recipe, clock: Clock) -> Binding:
    family = family_of(transformer)
    recipe.check_family(family.name, f"this is a {family.name} transformer")
    return Binding(transformer, family, recipe, clock, _execution_device(target, transformer))


def _execution_device(target: Any, transformer: nn.Module) -> torch.device:
    """Where a transformer runs, which differs from where its weights are while they are offloaded."""
    device = getattr(target, "_execution_device", None)  # a pipeline's
    if isinstance(device, torch.device):
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in transformer.modules())  # accelerate's
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in devices if device is not None), None)
    return transformer.device if device is None else torch.device(device)


def _transformers(target: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline, or the transformer itself, out of any `torch.compile` wrapper."""
    if isinstance(target, nn.Module):
        found = {"transformer": target}
    else:
        found = {name: getattr(target, name, None) for name in _TRANSFORMERS}
    found = {
        name: getattr(module, "_orig_mod", module)
        for name, module in found.items()
        if isinstance(module, nn.Module)
    }
    if not found:
        raise TypeError(
            f"expected a diffusers pipeline with a transformer, or a transformer, got {type(target).__name__}"
        )
    return found
