"""A recipe bound to one transformer: its processors and hooks, and what happens in each of its calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dit_accel.attention import transformer_call
from dit_accel.attention.run_memory import CallMemory
from dit_accel.attention.transformer_call import TransformerCall
from dit_accel.errors import UnavailableError
from dit_accel.guidance.branch import Branch
from dit_accel.masks.layout import TokenLayout
from dit_accel.pipelines.families.base import Family
from dit_accel.pipelines.families.processors import Accelerated, accelerated, install
from dit_accel.recipe.adapter_parts import Part
from dit_accel.recipe.layer_patterns import Chunks, LayerPatterns, assign_patterns
from dit_accel.recipe.recipe import Recipe

from . import checkpointing, guard, refusals
from .adapted import Adapted
from .dual_paths import DualPaths
from .geometry import Geometry, backend, cheapest, of_process
from .geometry_cache import GeometryCache
from .layer_inputs import LayerInputs, layer_sizes
from .measured_speed import MeasuredSpeed, measured_speed
from .run_record import RunRecord
from .splitting import check_shared, shards_of
from .steps import StepTracker, Tick
from .token_moves import TokenMoves

_NO_EXPORT = (
    "what an accelerated transformer computes depends on the step and the size of each call, which "
    "`torch.export` cannot write down; call `dit_accel.disable` before exporting"
)


class Binding:
    """A recipe bound to one transformer instance. All is checked here; nothing is patched before `attach`.

    Attributes:
        transformer, family, recipe: what is bound.
        steps: tells sampler steps.
        name: the pipeline's name for the transformer.
        modules, layers: its attention layers, and what the recipe says of each.
        heads, head_dim: of its layers.
        sizes: the same of each layer, with the channels of its input.
        places: what each layer is called among the transformer's modules.
        adapted: the recipe's adapter in this transformer, or None.
        branch: of guidance, or None.
        paths: FreeSwim's two branches, or None.
        shards: what this process has of it, of several that share it (context parallelism), or None.
        geometry, device, dtype: of the latest call, before one those that are expected.
        inputs: names of the arguments of its forward.
        record: where runs are recorded; set by the handle.
    """

    def __init__(
        self,
        transformer: Any,
        family: Family,
        recipe: Recipe,
        steps: StepTracker,
        device: torch.device,
        speed: MeasuredSpeed | None = None,
        name: str = "transformer",
        adapter: Part | None = None,
    ):
        self.transformer, self.family, self.recipe, self.steps = transformer, family, recipe, steps
        self.name = name
        self.modules = family.found_layers(transformer)
        for module in self.modules.values():
            if isinstance(module.processor, Accelerated):  # of an earlier binding, put back by another
                install(module, module.processor.original)
        self.heads, self.head_dim = family.heads(transformer)
        for pattern in recipe.patterns:
            pattern.check_model(family.name, list(self.modules), self.heads, self.head_dim)
        self.layers = assign_patterns(recipe, list(self.modules), self.heads)
        modules = self.modules.items()
        self.sizes = {name: layer_sizes(family, one, self.heads, self.head_dim) for name, one in modules}
        self.parallel = getattr(transformer, "_parallel_config", None)
        self.shards = shards_of(transformer, family, list(self.modules), self.heads)
        self._speed = speed
        self.adapted: Adapted | None = None
        if recipe.adapter is not None and adapter is not None:
            self.adapted = Adapted(transformer, adapter, recipe.adapter.file())
        places = {module: name for name, module in transformer.named_modules()}
        self.places = {layer: places[module] for layer, module in self.modules.items()}
        self.branch: Branch | None = None
        if recipe.guidance is not None:
            self.branch = Branch(recipe.guidance, family, transformer, self.heads, owner=self)
        self.paths: DualPaths | None = None
        self.device, self.dtype = device, transformer.dtype
        self.geometry: Geometry | None = None
        self.record: Callable[[Tick], RunRecord] = lambda tick: RunRecord(tick.run)
        self._processors: dict[str, Accelerated] = {}
        self._moves = TokenMoves(transformer, family, owner=self)
        self._inputs = LayerInputs(family, self.modules, self.layers, self.sizes, owner=self)
        self._geometries = GeometryCache(self.layers, self._built)
        self._memo: dict = {}
        self._guard = guard.RunGuard(transformer, self.modules, name)
        self._hooks: list = []
        parameters = inspect.signature(type(transformer).forward).parameters
        self.inputs = [parameter for parameter in parameters if parameter != "self"]
        refusals.check_recipe(self)

    @property
    def attached(self) -> bool:
        """Whether its processors and hooks are installed."""
        return bool(self._hooks)

    @property
    def sparse_layers(self) -> list[str]:
        return [layer.name for layer in self.layers if layer.heads]

    @property
    def patched_layers(self) -> list[str]:
        """Layers with a processor of ours: sparse ones, those that guidance perturbs, all that are shared."""
        perturbed = {} if self.branch is None else self.branch.layers
        every = self.family.accelerates_dense or self.shards is not None
        return [layer.name for layer in self.layers if every or layer.heads or layer.name in perturbed]

    @property
    def backend(self) -> str:
        """The kernel backend of sparse layers, the one chosen where the recipe leaves it to `auto`."""
        return self.backend_for(None)

    def backend_for(self, quantization: str | None) -> str:
        """The same of layers in a numeric format."""
        return backend(self.recipe, self.device, self.dtype, self.head_dim, quantization)

    def speed(self) -> MeasuredSpeed:
        """How fast attention was measured to be with the backend on the device in the dtype."""
        if self._speed is not None:
            return self._speed
        dtype = str(self.dtype).removeprefix("torch.")
        return measured_speed(self.device.type, dtype, self.head_dim).of_backend(
            self.backend, self.device.type
        )

    def geometry_of(
        self, layout: TokenLayout, step: int = 0, sigma: float | None = None, total: int | None = None
    ) -> Geometry:
        """What all layers compute on a layout at a sampler step, on the latest call's device and dtype."""
        return self._geometries.at(layout, step, self.device, self.dtype, sigma, total=total)

    def adopt(self, other: Binding) -> None:
        """Go on with the steps and the geometries of a binding of the same transformer and patterns."""
        self.steps, self._geometries = other.steps, other._geometries

    def _built(
        self,
        layers: list[LayerPatterns],
        layout: TokenLayout,
        device: torch.device,
        dtype: torch.dtype,
        chunks: Chunks | None,
        like: Geometry | None,
    ) -> Geometry:
        refusals.check_break_even(self)
        layouts = [self.family.layer_layout(layer.name, layout) for layer in layers]
        leading = self.family.leading(self.transformer, layout)
        moves = self.family.moves_tokens
        geometry = cheapest(
            self.recipe, layers, layout, layouts, leading, device, self.speed(), like, moves, chunks
        )
        if self.shards is None:
            return geometry
        return of_process(geometry, layers, self.shards, device, moves, like)

    # -- patching ------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Install processors, hooks and the adapter on this transformer instance."""
        if self.adapted is not None:
            self.adapted.attach()
        for name in self.patched_layers:
            module = self.modules[name]
            self._processors[name] = accelerated(module.processor, self, name, self.family.processor)
            install(module, self._processors[name])
        self._hooks.append(self.transformer.register_forward_pre_hook(self._before, with_kwargs=True))
        after = self.transformer.register_forward_hook(
            self._after, prepend=True, with_kwargs=True, always_call=True
        )  # the first, so that hooks of the user's on the transformer see tokens where the model has them
        self._hooks.append(after)
        self._moves.attach()
        self._inputs.attach()
        self._hide_config()
        for part in (self.branch, self.paths):
            if part is not None:
                part.attach()

    def _hide_config(self) -> None:
        if self.family.hidden_config:
            hidden_config().attach(self.transformer, self.family.hidden_config, owner=self)

    def detach(self) -> None:
        """Put the original processors back and remove the hooks and the adapter."""
        if self.adapted is not None:
            self.adapted.detach()
        for name, processor in self._processors.items():
            processor.retire()  # SD3's `unfuse_qkv_projections` puts back what it saw when it fused
            if self.modules[name].processor is processor:
                install(self.modules[name], processor.original)
        for hook in self._hooks:
            hook.remove()
        self._moves.detach()
        self._inputs.detach()
        if self.family.hidden_config:
            hidden_config().detach(self.transformer)
        checkpointing.detach(self.transformer)
        for part in (self.branch, self.paths):
            if part is not None:
                part.detach()
        transformer_call.end(self)  # where an interrupt ended it, which runs no hooks
        self._processors, self._hooks = {}, []

    # -- one call of the transformer -----------------------------------------------------------------------

    @torch.compiler.disable(reason=_NO_EXPORT)
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if torch.compiler.is_exporting():
            raise UnavailableError(_NO_EXPORT)
        refusals.check_parallel(self)
        refusals.check_processors(self.modules, self._processors)
        if self.adapted is not None:
            self.adapted.check()
        inputs = {**dict(zip(self.inputs, args, strict=False)), **kwargs}
        if self.shards is not None:
            check_shared(self.family, self.transformer, inputs)
        between, kept = self.family.between_steps(inputs), self.family.kept_between(inputs)
        tick = self.steps.tick(self.family.timestep(inputs), between, kept)
        noisy = self.recipe.needs_noise or (self.paths is not None and self.paths.full.needs_noise)
        sigma = self.steps.noise_level(self.family.pure_noise, self.family.clean) if noisy else None
        dense = self.recipe.is_dense_step(tick.step, tick.total, sigma)
        call = TransformerCall(
            self,
            layers={},
            layouts={},
            step=tick.step,
            backend=self.recipe.backend,
            record=self.record(tick),
        )
        self._guard.check(call.record.guarded)
        rows = None
        if self.paths is not None:
            full = self.paths.full.is_dense_step(tick.step, tick.total, sigma)
            inputs, rows = self.paths.enter(inputs, tick, full)
        if self._processors:
            call = self._with_layers(call, inputs, tick, dense, sigma)
            checkpointing.attach(self.transformer, self)
        if rows is not None:
            call = self.paths.begin(call, rows)
        if call.moved:
            self._moves.attach()
            inputs = self._moves.enter(inputs, call.geometry)
        counted = call.layers or (self.sparse_layers and not dense)
        call.record.count(tick, call.geometry if counted else None, dense or not self.sparse_layers)
        if self.branch is not None:
            call = self._with_guidance(call, inputs, tick)
        transformer_call.begin(call)
        return (), inputs

    def _with_layers(
        self, call: TransformerCall, inputs: dict[str, Any], tick: Tick, dense: bool, sigma: float | None
    ) -> TransformerCall:
        """The call with what its layers compute."""
        layout = self.family.layout(self.transformer, inputs, self._memo)
        if self.shards is not None:
            self.shards.check(layout)
        latents = self.family.latents(inputs)
        self.device, self.dtype = latents.device, latents.dtype
        frames = self.family.chunk_frames(self.transformer, inputs)
        chunks = None if frames is None else Chunks(frames, self.heads, dense=dense and frames > 1)
        causal = chunks is not None and chunks.causal
        self.geometry = geometry = self._geometries.at(
            layout, tick.step, self.device, self.dtype, sigma, chunks, tick.total
        )
        self._hide_config()
        call.record.grids[self.name] = layout.grid
        layers = {
            layer.name: own
            for layer, own in zip(self.layers, geometry.attentions, strict=True)
            if own is not None
        }
        dense = dense and not causal  # where the model's own mask is one of ours
        moved = geometry.permutation is not None and (not dense or self._moves.may_be_carried(tick.run))
        return replace(
            call,
            layers={} if dense else self.family.around(layers, inputs, self._memo),
            layouts={layer.name: own for layer, own in zip(self.layers, geometry.layouts, strict=True)},
            text_valid=self.family.text_valid(inputs, self._memo),
            memory=self._memory(tick),
            formats=geometry.formats,
            tails={layer.name: layer.tail for layer in self.layers if layer.tail},
            learned=self._learned(),
            places=geometry.permutation if moved else None,
            geometry=geometry,
            any_length=not self.family.moves_tokens,
            moved=moved,
            shards=self.shards,
            balances={} if dense else geometry.balances,
        )

    def _learned(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """Learned weights by layer."""
        if self.adapted is None or not self.adapted.learned:
            return {}
        learned = self.adapted.learned_on(self.device)
        return {layer: learned[place] for layer, place in self.places.items() if place in learned}

    def _memory(self, tick: Tick) -> CallMemory | None:
        """What layers keep from step to step; nothing in training, where calls may have other samples."""
        if torch.is_grad_enabled():
            return None
        return self.steps.memory.call(self.name, (tick.step, tick.evaluation))

    def _with_guidance(self, call: TransformerCall, inputs: dict[str, Any], tick: Tick) -> TransformerCall:
        guided = self.branch.begin(tick, self.steps.pipeline, inputs)
        if self.branch.alone:
            return replace(call, layers=self.branch.alone_layers(call, tick))
        return replace(call, guidance=guided)

    def _leave_alone(self, seen: dict[str, tuple[int, int]], tokens: int) -> None:
        """Counts layers as dense that turned out to attend to other numbers of tokens than the layout's.

        Args:
            seen: queries and keys of such layers.
            tokens: of the layout.

        Raises:
            ValueError: all layers that were to be sparse are such.
        """
        sparse = set(self.sparse_layers)
        if not sparse & seen.keys():
            return
        if sparse <= seen.keys():
            lengths = " and ".join(f"{q} queries, {k} keys" for q, k in sorted(set(seen.values())))
            raise ValueError(
                f"no sparse layer of {type(self.transformer).__name__} attends to the {tokens} tokens of "
                f"the `layout` given to `enable`, but to {lengths}; give the layout that its layers have"
            )
        self.layers = [
            LayerPatterns(layer.name, reason="attends from {} to {} tokens".format(*seen[layer.name]))
            if layer.name in seen
            else layer
            for layer in self.layers
        ]
        self._geometries = GeometryCache(self.layers, self._built)

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call = transformer_call.current(self)
        try:
            return None if output is None or call is None else self._finished(call, kwargs, output)
        finally:  # with an output of None: the call raised
            transformer_call.end(self)
            if self.branch is not None:
                self.branch.end()

    def _finished(self, call: TransformerCall, inputs: dict[str, Any], output: Any) -> Any:
        """The forward's output in the model's own token order, with guidance; None: as it is."""
        doubled = call.rows is not None and call.rows.full

        def restored(output: Any) -> Any:  # a tensor; None of a call that predicts nothing
            if isinstance(output, torch.Tensor):  # Kandinsky's, without `return_dict`
                sample = output
            else:
                sample = output[0] if isinstance(output, tuple) else output.sample
            sample = self.family.predicted(sample)
            sample = self._moves.leave(sample, call.geometry) if call.moved else sample
            return sample[: call.rows.batch] if doubled else sample

        sample = own = restored(output)
        if self.branch is not None:
            sample = self.branch.guide(call, own, restored)
        if self.recipe.guard and sample is not None:
            self._guard.look(call, inputs, sample)
        call.record.note(self.name, call)
        if call.any_length:
            other = {
                layer: said["other tokens"] for layer, said in call.notes.items() if "other tokens" in said
            }
            self._leave_alone(other, call.geometry.layout.seq_len)
        if not call.moved and not doubled and sample is own:
            return None
        if isinstance(output, torch.Tensor):
            return sample
        if isinstance(output, tuple):
            return (sample, *output[1:])
        return type(output)(**{**output, "sample": sample})  # LTX-2's has audio beside it


def hidden_config() -> ModuleType:
    """The module of that name, which needs diffusers."""
    from . import hidden_config

    return hidden_config
