"""A recipe bound to one transformer: what each layer does, its masks per geometry, the hooks."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import kernels, selectors
from .blockmask import BlockMask
from .clock import Clock
from .errors import UnavailableError
from .layout import TokenLayout
from .mixture import join_heads
from .patterns import Dense, Pattern
from .pipelines.attention import DENSE, Family, SparseProcessor
from .recipe import Recipe

_GEOMETRIES_KEPT = 8
_SPATIAL_CACHES = ("FasterCacheConfig", "SeaCacheConfig")  # they take Fourier transforms over the frame


@dataclass(frozen=True)
class LayerPlan:
    """What one attention layer does at steps that are not dense.

    `heads` holds one pattern per head, or is empty where the layer keeps the model's own
    attention, for the `reason` given.
    """

    name: str
    heads: tuple[Pattern, ...] = ()
    reason: str = ""

    @property
    def patterns(self) -> list[Pattern]:
        """The distinct patterns, in order of first use."""
        return list(dict.fromkeys(self.heads))


def plan_layers(recipe: Recipe, layers: list[str], heads: int) -> list[LayerPlan]:
    """What each layer does under a recipe. Raises ValueError for selectors and indices that match nothing."""
    attention = recipe.attention if isinstance(recipe.attention, dict) else {"all": recipe.attention}
    dense = recipe.dense_layer_indices(len(layers))
    plans = []
    for index, (name, row) in enumerate(zip(layers, selectors.assign(attention, layers, heads), strict=True)):
        if index in dense:
            plans.append(LayerPlan(name, reason="dense_layers"))
        elif all(p is None for p in row):
            plans.append(LayerPlan(name, reason="no selector names it"))
        elif all(p is None or isinstance(p, Dense) for p in row):
            plans.append(LayerPlan(name, reason="Dense()"))
        else:
            plans.append(LayerPlan(name, tuple(p or Dense() for p in row)))
    return plans


@dataclass(frozen=True, eq=False)
class Geometry:
    """What depends on the token geometry: the permutation of the visual tokens and each layer's mask."""

    layout: TokenLayout
    permutation: torch.Tensor | None
    inverse: torch.Tensor | None
    masks: list[BlockMask | None]
    densities: list[float]
    block_densities: list[float]


class Binding:
    """A recipe bound to one transformer instance. All is checked here; nothing is patched before `attach`."""

    def __init__(
        self, transformer: nn.Module, family: Family, recipe: Recipe, clock: Clock, device: torch.device
    ):
        self.transformer, self.family, self.recipe, self.clock = transformer, family, recipe, clock
        self.modules = family.layers(transformer)
        self.heads = transformer.config.num_attention_heads
        self.head_dim = transformer.config.attention_head_dim
        self.plans = plan_layers(recipe, list(self.modules), self.heads)
        self.processors: dict[str, SparseProcessor] = {}
        self.geometry: Geometry | None = None  # of the latest call
        self.tally: Any = None  # called with each tick and geometry; set by the handle
        self._geometries: dict[tuple, Geometry] = {}
        self._memo: dict = {}
        self._moved: Geometry | None = None  # of the call in progress, if its tokens are permuted
        self._hooks: list = []
        self._inputs = [
            name for name in inspect.signature(type(transformer).forward).parameters if name != "self"
        ]
        self._check(device)

    @property
    def sparse_layers(self) -> list[str]:
        return [plan.name for plan in self.plans if plan.heads]

    def _check(self, device: torch.device) -> None:
        for name in self.sparse_layers:
            original = type(self.modules[name].processor).__name__
            if original not in self.family.originals:
                raise UnavailableError(
                    f"layer {name} of this {self.family.name} transformer has the attention processor "
                    f"{original}, which accelerated layers cannot stand in for (only "
                    f"{', '.join(self.family.originals)}); unload what installed it (such as an "
                    "IP-Adapter), or make the layer dense"
                )
        if self.sparse_layers:
            dtype = self.transformer.dtype
            size = block_size(self.recipe, device)
            reason = kernels.can_run(
                self.recipe.backend, device=device, dtype=dtype, head_dim=self.head_dim, block_size=size
            )
            if reason is not None:
                raise UnavailableError(f"backend {self.recipe.backend!r} cannot run here: {reason}")

    # -- patching ------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Install processors and hooks on this transformer instance."""
        for name in self.sparse_layers:
            module = self.modules[name]
            self.processors[name] = self.family.processor(module.processor, self.recipe.backend)
            module.set_processor(self.processors[name])
        self._hooks = [
            self.transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            self.transformer.register_forward_hook(self._after, always_call=True),
        ]
        rotary = self.family.rotary(self.transformer)
        if rotary is not None:
            self._hooks.append(rotary.register_forward_hook(self._after_rotary))

    def detach(self) -> None:
        """Put the original processors back and remove the hooks."""
        for name, processor in self.processors.items():
            if self.modules[name].processor is processor:
                self.modules[name].set_processor(processor.original)
        for hook in self._hooks:
            hook.remove()
        self.processors, self._hooks = {}, []

    # -- one call of the transformer -----------------------------------------------------------------------

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self._check_processors()
        inputs = {**dict(zip(self._inputs, args, strict=False)), **kwargs}
        tick = self.clock.tick(inputs["timestep"])
        dense = self.recipe.is_dense_step(tick.step, tick.total)
        if self.processors:
            layout = self.family.layout(self.transformer, inputs, self._memo)
            self.geometry = self._geometry_of(layout, inputs["hidden_states"].device)
            for plan, mask in zip(self.plans, self.geometry.masks, strict=True):
                if mask is not None:
                    self.processors[plan.name].layout = layout
                    self.processors[plan.name].route = DENSE if dense else mask
            if self.geometry.permutation is not None and (not dense or self._keeps_tokens()):
                self._check_cache()
                self._moved = self.geometry
                inputs = self.family.enter(self.transformer, inputs, layout, self._permute)
        self.tally(tick, dense, self.geometry)
        return (), inputs

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        for processor in self.processors.values():
            processor.route = None
        moved = self._moved
        if moved is None or output is None:  # None: the call raised
            self._moved = None
            return None
        sample = output[0] if isinstance(output, tuple) else output.sample
        sample = self.family.leave(self.transformer, sample, moved.layout, self._restore)
        self._moved = None
        return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)

    def _after_rotary(self, module: nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> Any:
        return None if self._moved is None else tuple(self._permute(table, 1) for table in output)

    def _permute(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.index_select(dim, self._moved.permutation.to(tensor.device))

    def _restore(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.index_select(dim, self._moved.inverse.to(tensor.device))

    def _keeps_tokens(self) -> bool:
        """Whether diffusers hooks inside the transformer may carry tokens from step to step (`enable_cache`).

        Then dense steps must keep the token order of the others.
        """
        registries = (
            m.__dict__.get("_diffusers_hook") for m in self.transformer.modules() if m is not self.transformer
        )
        return any(registry is not None and registry.hooks for registry in registries)

    def _check_cache(self) -> None:
        cache = type(getattr(self.transformer, "_cache_config", None)).__name__
        if cache in _SPATIAL_CACHES:
            raise UnavailableError(
                f"{cache.removesuffix('Config')} reads the place of each token inside the transformer, where "
                'dit-accel has reordered them; use `Recipe(..., order="raster")` with it, or another cache'
            )

    def _check_processors(self) -> None:
        for name, processor in self.processors.items():
            if self.modules[name].processor is not processor:
                raise RuntimeError(
                    f"the attention processor of layer {name} was replaced by "
                    f"{type(self.modules[name].processor).__name__} while dit-accel was enabled; call "
                    "`dit_accel.disable` before replacing processors (such as loading an IP-Adapter) "
                    "and enable again"
                )

    # -- geometry ------------------------------------------------------------------------------------------

    def _geometry_of(self, layout: TokenLayout, device: torch.device) -> Geometry:
        key = (layout, device)
        if key not in self._geometries:
            while len(self._geometries) >= _GEOMETRIES_KEPT:
                del self._geometries[next(iter(self._geometries))]
            self._geometries[key] = self._build_geometry(layout, device)
        return self._geometries[key]

    def _build_geometry(self, layout: TokenLayout, device: torch.device) -> Geometry:
        """Masks of all layers, in the order that suits the first sparse pattern."""
        size = block_size(self.recipe, device)
        order: Any = self.recipe.order
        by_pattern: dict[Pattern, BlockMask] = {}
        for pattern in sorted(
            (p for plan in self.plans for p in plan.patterns), key=lambda p: isinstance(p, Dense)
        ):
            if pattern not in by_pattern:
                by_pattern[pattern] = pattern.block_mask(layout, size, order=order, device=device)
                order = visual_permutation(by_pattern[pattern], layout)
        by_heads: dict[tuple, BlockMask | None] = {(): None}
        for plan in self.plans:
            if plan.heads not in by_heads:
                by_heads[plan.heads] = join_heads(by_pattern, plan.heads)
        masks = [by_heads[plan.heads] for plan in self.plans]
        in_place = torch.equal(order, torch.arange(layout.visual_len))
        return Geometry(
            layout=layout,
            permutation=None if in_place else order.to(device),
            inverse=None if in_place else torch.argsort(order).to(device),
            masks=masks,
            densities=[1.0 if mask is None else mask.density for mask in masks],
            block_densities=[1.0 if mask is None else mask.block_density for mask in masks],
        )


def block_size(recipe: Recipe, device: torch.device) -> tuple[int, int]:
    """The recipe's block size, or the default of the device."""
    return recipe.block_size or kernels.default_block_size(device)


def visual_permutation(mask: BlockMask, layout: TokenLayout) -> torch.Tensor:
    """The order of the visual tokens in a mask: int64 (visual_len,) on the CPU."""
    if mask.order is None:
        return torch.arange(layout.visual_len)
    return mask.order[: layout.visual_len].cpu() - layout.visual_slice.start
