"""A recipe bound to one transformer: its processors and hooks, and the masks of the geometries it met."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn

from . import kernels
from .choice import HeadChoice
from .clock import Clock
from .errors import UnavailableError
from .geometry import Geometry, backend, block_sizes, cheapest
from .guidance.branch import Branch, Call
from .kernels.block_sparse import opaque
from .layers import plan_layers
from .layout import TokenLayout
from .pipelines.attention import DENSE, Family, SparseProcessor
from .rates import Rates, measured
from .recipe import Recipe

_GEOMETRIES_KEPT = 16
_SPATIAL_CACHES = ("FasterCacheConfig", "SeaCacheConfig")  # they take Fourier transforms over the frame


class Binding:
    """A recipe bound to one transformer instance. All is checked here; nothing is patched before `attach`."""

    def __init__(
        self,
        transformer: nn.Module,
        family: Family,
        recipe: Recipe,
        clock: Clock,
        device: torch.device,
        rates: Rates | None = None,
    ):
        self.transformer, self.family, self.recipe, self.clock = transformer, family, recipe, clock
        self.modules = family.layers(transformer)
        for module in self.modules.values():
            if isinstance(module.processor, SparseProcessor):  # of an earlier binding, put back by another
                module.set_processor(module.processor.original)
        self.heads = transformer.config.num_attention_heads
        self.head_dim = transformer.config.attention_head_dim
        self.plans = plan_layers(recipe, list(self.modules), self.heads)
        used = dict.fromkeys(pattern for plan in self.plans for pattern in plan.patterns)
        self._changing = [pattern for pattern in used if len(pattern.variants) > 1]  # from step to step
        self._rates = rates
        self.branch: Branch | None = None
        if recipe.guidance is not None:
            self.branch = Branch(recipe.guidance, family, transformer, self.heads)
        self.processors: dict[str, SparseProcessor] = {}
        # of the latest call, before one those that are expected
        self.device, self.dtype = device, transformer.dtype
        self.geometry: Geometry | None = None  # of the latest call
        self.tally: Any = None  # called with each tick and geometry; set by the handle
        self._geometries: dict[tuple, Geometry] = {}
        self._memo: dict = {}
        self._run: int | None = None
        self._temporal: dict[str, torch.Tensor] = {}  # in the latest run, by layer
        self._moved: Geometry | None = None  # of the call in progress, if its tokens are permuted
        self._hooks: list = []
        self._inputs = [
            name for name in inspect.signature(type(transformer).forward).parameters if name != "self"
        ]
        self._check()

    @property
    def sparse_layers(self) -> list[str]:
        return [plan.name for plan in self.plans if plan.heads]

    @property
    def patched_layers(self) -> list[str]:
        """Layers with a processor of ours: sparse ones, and those that guidance perturbs."""
        perturbed = {} if self.branch is None else self.branch.layers
        return [plan.name for plan in self.plans if plan.heads or plan.name in perturbed]

    def temporal_heads(self) -> dict[str, float]:
        """By layer, the share of temporal heads of SparseVideoGen when they last chose in the latest run."""
        choices = {plan.name: mask for plan, mask in zip(self.plans, self.geometry.masks, strict=True)}
        return {name: choices[name].temporal_share(temporal) for name, temporal in self._temporal.items()}

    @property
    def backend(self) -> str:
        """The kernel backend of sparse layers, the one chosen where the recipe leaves it to `auto`."""
        return backend(self.recipe, self.device, self.dtype, self.head_dim)

    def rates(self) -> Rates:
        """How fast attention was measured to be with the backend on the device in the dtype."""
        if self._rates is not None:
            return self._rates
        dtype = str(self.dtype).removeprefix("torch.")
        return measured(self.device.type, dtype, self.head_dim).of_backend(self.backend, self.device.type)

    def _check(self) -> None:
        for name in self.patched_layers:
            reason = self.family.refusal(self.modules[name])
            if reason is not None:
                raise UnavailableError(f"layer {name} of this {self.family.name} transformer {reason}")
        if self.sparse_layers:
            size = next(iter(block_sizes(self.recipe, self.device)))
            reason = kernels.can_run(
                self.recipe.backend,
                device=self.device,
                dtype=self.dtype,
                head_dim=self.head_dim,
                block_size=size,
            )
            if reason is not None:
                raise UnavailableError(f"backend {self.recipe.backend!r} cannot run here: {reason}")
            self._check_break_even()

    def _check_break_even(self) -> None:
        if self.recipe.min_tokens == "auto" and not self.rates().break_even:
            raise UnavailableError(
                f"`min_tokens='auto'` needs a break-even length, and that of backend {self.backend!r} was "
                f"not measured on {self.device.type} in {self.dtype}; give a number"
            )

    def adopt(self, other: Binding) -> None:
        """Go on with the clock and the masks of a binding of the same transformer and patterns."""
        self.clock, self._geometries = other.clock, other._geometries

    # -- patching ------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Install processors and hooks on this transformer instance."""
        for name in self.patched_layers:
            module = self.modules[name]
            self.processors[name] = self.family.processor(module.processor, self.recipe.backend)
            module.set_processor(self.processors[name])
        self._hooks = [
            self.transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            self.transformer.register_forward_hook(self._after, always_call=True),
        ]
        for module, dim in self.family.placed_outputs(self.transformer).items():
            self._hooks.append(module.register_forward_hook(partial(self._after_placed, dim)))
        if self.branch is not None:
            self.branch.attach()

    def detach(self) -> None:
        """Put the original processors back and remove the hooks."""
        for name, processor in self.processors.items():
            processor.route = DENSE  # SD3's `unfuse_qkv_projections` puts back what it saw when it fused
            if self.modules[name].processor is processor:
                self.modules[name].set_processor(processor.original)
        for hook in self._hooks:
            hook.remove()
        if self.branch is not None:
            self.branch.detach()
        self.processors, self._hooks = {}, []

    # -- one call of the transformer -----------------------------------------------------------------------

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self._check_processors()
        inputs = {**dict(zip(self._inputs, args, strict=False)), **kwargs}
        tick = self.clock.tick(inputs["timestep"])
        dense = self.recipe.is_dense_step(tick.step, tick.total)
        if self.processors:
            self._check_checkpointing()
            layout = self.family.layout(self.transformer, inputs, self._memo)
            text_valid = self.family.text_valid(inputs, self._memo)
            self.device, self.dtype = inputs["hidden_states"].device, inputs["hidden_states"].dtype
            earlier, geometry = self.geometry, self.geometry_of(layout, tick.step)
            if tick.run != self._run or earlier is None or geometry.layout != earlier.layout:
                self._run, self._temporal = tick.run, {}
            self.geometry = geometry
            choices = {mask for mask in geometry.masks if isinstance(mask, HeadChoice)}
            samples = {} if dense else {choice: choice.sample(tick.step) for choice in choices}
            for plan, mask, own in zip(self.plans, geometry.masks, geometry.layouts, strict=True):
                if plan.name in self.processors:
                    processor = self.processors[plan.name]
                    processor.layout, processor.text_valid = own, text_valid
                    processor.route = DENSE if dense or mask is None else mask
                    processor.sample, processor.temporal = samples.get(mask), None
            for mask in set(geometry.masks) - {None}:
                opaque.announce(mask.mask if isinstance(mask, HeadChoice) else mask)
            if geometry.permutation is not None and (not dense or self._keeps_tokens()):
                self._check_cache()
                self._moved = geometry
                inputs = self.family.enter(self.transformer, inputs, layout, self._permute)
        self.tally(tick, dense or not self.sparse_layers, self.geometry)
        if self.branch is not None:
            self.branch.begin(tick, self.clock, inputs, self._perturb)
        return (), inputs

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        try:
            return None if output is None else self._finished(output)  # None: the call raised
        finally:
            self._moved = None
            for processor in self.processors.values():
                processor.route = processor.perturb = None

    def _finished(self, output: Any) -> Any:
        """The forward's output in the model's own token order, with guidance; None: as it is."""
        for name, processor in self.processors.items():
            if processor.temporal is not None:
                self._temporal[name] = processor.temporal
        sample = restored = self._restored(output)
        if self.branch is not None:
            sample = self.branch.guide(restored, self._perturbed)
        if self._moved is None and sample is restored:
            return None
        return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)

    def _restored(self, output: Any) -> torch.Tensor:
        """The sample of a forward's output, in the model's own token order."""
        sample = output[0] if isinstance(output, tuple) else output.sample
        if self._moved is None:
            return sample
        return self.family.leave(self.transformer, sample, self._moved.layout, self._restore)

    def _perturbed(self, call: Call) -> torch.Tensor:
        """The prediction of the perturbed branch of a call that has just been made."""
        self._perturb(call.strength)
        return self._restored(self.branch.perturbed(call))

    def _perturb(self, strength: float) -> None:
        """Perturb, until the call in progress ends."""
        places = None if self._moved is None else self._moved.permutation
        for name, perturb in self.branch.layer_perturbations(strength, places).items():
            self.processors[name].perturb = perturb

    def _after_placed(self, dim: int, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._moved is None:
            return None
        if isinstance(output, torch.Tensor):
            return self._permute(output, dim)
        return tuple(self._permute(tensor, dim) for tensor in output)

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

    def _check_checkpointing(self) -> None:
        if torch.is_grad_enabled() and getattr(self.transformer, "gradient_checkpointing", False):
            raise UnavailableError(
                "gradient checkpointing calls blocks a second time, outside the transformer's call, which "
                "accelerated layers cannot follow; call `transformer.disable_gradient_checkpointing()`, or "
                "`dit_accel.disable` it first"
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

    def geometry_of(self, layout: TokenLayout, step: int = 0) -> Geometry:
        """Masks of all layers on a layout at a sampler step, built once for each device and dtype and kept.

        Where patterns change from step to step, block size and token order stay as they are at all of them.
        """
        geometry = self._kept(layout)
        return geometry if not self._changing else self._kept(layout, step, geometry)

    def _kept(self, layout: TokenLayout, step: int | None = None, like: Geometry | None = None) -> Geometry:
        """Of the patterns at a step, None for what they are outside a run."""
        plans, shapes = self.plans, ()
        if step is not None:
            shapes = tuple(pattern.at_step(step) for pattern in self._changing)
        key = (layout, self.device, self.dtype, shapes)
        if key not in self._geometries:
            if step is not None:
                plans = [plan.at_step(step) for plan in plans]
            self._check_break_even()
            while len(self._geometries) >= _GEOMETRIES_KEPT:
                del self._geometries[next(iter(self._geometries))]
            layouts = [self.family.layer_layout(plan.name, layout) for plan in plans]
            leading = self.family.leading(self.transformer, layout)
            self._geometries[key] = cheapest(
                self.recipe, plans, layout, layouts, leading, self.device, self.rates(), like
            )
        return self._geometries[key]
