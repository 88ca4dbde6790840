"""Laying out tokens where they enter a transformer, and back where they leave it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from dit_accel.attention import transformer_call
from dit_accel.errors import UnavailableError
from dit_accel.pipelines.families.base import Family

from .geometry import Geometry
from .splitting import BeforeSplit, is_split

_SPATIAL_CACHES = ("FasterCacheConfig", "SeaCacheConfig")  # they take Fourier transforms over the frame
_OWN_CODE = ("dit_accel.", "diffusers.", "transformers.", "torch.", "peft.", "accelerate.")


class TokenMoves:
    """Moves the visual tokens of one transformer's calls into the order of a geometry.

    A family says where tokens enter and leave. Modules inside whose output has a place per token, such as
    tables of the rotary embedding, get a hook, and a new one when they are replaced.
    """

    def __init__(self, transformer: nn.Module, family: Family, owner: Any):
        self.transformer, self.family, self.owner = transformer, family, owner
        self._hooks: dict[nn.Module, Any] = {}
        self._carried: tuple[int | None, bool] = (None, True)  # of a run, whether any may be

    def attach(self) -> None:
        """Hooks the modules whose output has a place per token; again after any of them was replaced."""
        placed = self.family.placed_outputs(self.transformer)
        if placed.keys() != self._hooks.keys():
            self.detach()
            for module, dim in placed.items():
                self._hooks[module] = BeforeSplit(module, partial(self._after_placed, dim))

    def detach(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}

    def enter(self, inputs: dict[str, Any], geometry: Geometry) -> dict[str, Any]:
        """The inputs of a call with its tokens in the order of the geometry."""
        cache = type(getattr(self.transformer, "_cache_config", None)).__name__
        if cache in _SPATIAL_CACHES:
            raise UnavailableError(
                f"{cache.removesuffix('Config')} reads the place of each token inside the transformer, where "
                'dit-accel has reordered them; use `Recipe(..., order="raster")` with it, or another cache'
            )
        return self.family.enter(
            self.transformer, inputs, geometry.layout, partial(_select, geometry.permutation)
        )

    def leave(self, sample: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """A forward's output back in the model's own order."""
        return self.family.leave(
            self.transformer, sample, geometry.layout, partial(_select, geometry.inverse)
        )

    def _after_placed(self, dim: int, module: nn.Module, args: tuple, output: Any) -> Any:
        call = transformer_call.current(self.owner)
        if call is None or not call.moved:
            return None
        geometry = call.geometry
        return self.family.move_placed(output, dim, geometry.layout, partial(_select, geometry.permutation))

    def may_be_carried(self, run: int) -> bool:
        """Whether tokens may be carried from step to step in a run, as it was when first asked."""
        latest, may = self._carried
        if latest != run:
            may = not self._nothing_is_carried()
            self._carried = run, may
        return may

    def _nothing_is_carried(self) -> bool:
        """Whether it is known that no code inside the transformer carries tokens from step to step.

        Caches do, those of diffusers by hooks, those of others by replaced forwards and blocks, and a hook
        of the user's may. All steps must then have one token order.
        """
        for module in self.transformer.modules():
            split = is_split(module)
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if module is not self.transformer and not all(map(_is_known, hooks)):
                return False
            registry = module.__dict__.get("_diffusers_hook")
            if registry is not None and registry.hooks and module is not self.transformer and not split:
                return False
            forward = type(module).forward
            own = module.__dict__.get("forward")
            if own is not None and not split:  # accelerate's, which moves weights, keeps what it replaced
                replaced = getattr(module.__dict__.get("_old_forward"), "__func__", None)
                if "_hf_hook" not in module.__dict__ or replaced is not forward:
                    return False
            if not _is_known(forward):
                return False
        return True


def _is_known(function: Any) -> bool:
    """Whether a function is of a library that is known to carry nothing by it."""
    function = function.func if isinstance(function, partial) else function
    return str(getattr(function, "__module__", "")).startswith(_OWN_CODE)


def _select(index: torch.Tensor, tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return tensor.index_select(dim, index.to(tensor.device))
