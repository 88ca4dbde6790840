"""What a recipe would do to a model at a size: densities, speed-up and memory, without weights or a run.

The prediction has two terms. Attention of a layer takes block density / efficiency of its dense time, and
what a call takes whatever it computes, where both are measured (`dit_accel.runtime.measured_speed`); where
they are not, only the ideal of an efficiency of 1 is given. The rest of a step takes its FLOPs at a rate
relative to dense attention that is measured for the model or else assumed to be 1. Times cancel out of every
speed-up, so none is predicted.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel.arguments import positive
from dit_accel.attention.call import LayerAttention
from dit_accel.kernels import default_block_size, fastest_backend
from dit_accel.masks.block_mask import BlockMask
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Pattern
from dit_accel.recipe.adapter import TRANSFORMERS, Adapter
from dit_accel.recipe.adapter_parts import LowRank
from dit_accel.recipe.layer_patterns import LayerPatterns
from dit_accel.recipe.recipe import Recipe, resolve
from dit_accel.runtime.adapted import Adapted
from dit_accel.runtime.binding import Binding
from dit_accel.runtime.geometry import backend
from dit_accel.runtime.measured_speed import MeasuredSpeed, measured_speed
from dit_accel.runtime.steps import StepTracker

from .densities import LayerDensities, Moment, OrderDensity, layer_densities, plans
from .model_config import Flops, ModelConfig, Size, of_model, published
from .notes import notes_of
from .speedups import AtSteps, Speedup, flops_beside, speedups


@dataclass(frozen=True)
class Layers:
    """Layers that do the same. `pattern` is None where the model's own attention stays, for the `reason`."""

    names: tuple[str, ...]
    pattern: str | None
    tokens: int
    density: float
    block_density: float
    reason: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes of the weights, of q, k, v and the output of one layer (batch of one), of all block masks (None
    where they are not built), and of the S x S scores of one layer, which are never made."""

    weights: int
    qkv_and_output: int
    masks: int | None
    scores_never_made: int


@dataclass(frozen=True)
class Plan:
    """What `plan` returns.

    Attributes:
        recipe: its name, or its tag where it has none.
        size: frames, height, width in pixels; `grid` the same in tokens.
        tokens: in an attention layer, its text included; `text_tokens` are those of a prompt.
        steps, dense_steps: sampler steps of a run, and how many of them are dense.
        density, block_density: of all layers together at a sparse step, the mean of all of them.
        noise_levels: at which the steps begin, where the recipe goes by them.
        sampled: "N of M" query blocks that all block densities are estimated from; None where they are exact.
        layers, orders: per group of layers, and per pattern and token order; where patterns change with the
            noise level, at the last sparse step.
        flops: of one call of the transformer, dense.
        flops_beside: of a call at a sparse step, the mean of all of them, what patterns compute beside pairs
            of tokens: linear attention, for example.
        attention, step, run: times faster than dense: attention of the sparse layers, a sparse step, a run.
        notes: what the predictions rest on.
        head_works: makes, by the names of layers, the block density of every head; one number where all
            heads of a layer do alike.
        layer_attention, layout: of the first sparse layer; None and the model's layout where nothing is, or
            where block densities are estimated and no mask is built.
    """

    model: str
    family: str
    recipe: str
    size: Size
    grid: Size
    tokens: int
    text_tokens: int
    heads: int
    head_dim: int
    device: str
    dtype: str
    block_size: tuple[int, int]
    steps: int
    dense_steps: int
    noise_levels: tuple[float, ...] | None
    density: float
    block_density: float
    sampled: str | None
    layers: tuple[Layers, ...]
    orders: tuple[OrderDensity, ...]
    flops: Flops
    flops_beside: int
    attention: Speedup
    step: Speedup
    run: Speedup
    memory: Memory
    rates: MeasuredSpeed
    notes: tuple[str, ...]
    head_works: Callable[[], dict[str, tuple[float, ...]]] = field(repr=False, compare=False)
    layer_attention: LayerAttention | None = field(repr=False, compare=False)
    layout: TokenLayout = field(repr=False, compare=False)

    @property
    def mask(self) -> BlockMask | None:
        """Of the first sparse layer, where that is known before a run."""
        return None if self.layer_attention is None else self.layer_attention.mask

    def to_dict(self) -> dict[str, Any]:
        """Everything but the attention and the work of heads, as plain data."""
        hidden = ("head_works", "layer_attention", "layout")
        shown = (f.name for f in dataclasses.fields(self) if f.name not in hidden)
        return {name: _plain(getattr(self, name)) for name in shown}


def plan(
    recipe: Recipe | Pattern | str | Path,
    *,
    model: str | ModelConfig | None = None,
    family: str | None = None,
    variant: str | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    steps: int | None = None,
    shift: float | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rates: MeasuredSpeed | None = None,
) -> Plan:
    """What a recipe would do to a model at a size. Runs nothing and needs no weights and no such device.

    Args:
        recipe: a recipe, a pattern, a preset's name or a recipe file.
        model: a bundled model, a local pipeline folder or a `ModelConfig`.
        family, variant: a published model instead, of the family's reference if no variant is named.
        size: (width, height) in pixels; by default the model's usual size.
        frames: of a video.
        steps: sampler steps of a run.
        shift: of the noise schedule towards noise, 1 for an even one, where the recipe goes by noise level;
            by default the model's.
        device: device type that is planned for, `"cpu"` or `"cuda"`.
        dtype: number format that is planned for.
        rates: what to predict from, instead of the measured results that come with the library.

    Raises:
        ValueError: no such model, a size it would round, a recipe of another family, a pattern that does not
            fit the size.
    """
    model_config = chosen_model(model, family, variant)
    recipe = resolve(recipe)
    recipe.check_family(model_config.family, f"{model_config.name} is of {model_config.family!r}")
    pixels = _pixels(model_config, size, frames)
    steps = model_config.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"`steps` must be a positive integer, got {steps}")
    transformer = model_config.transformer()
    grid = model_config.grid(transformer, pixels)
    layout = model_config.layout(grid)
    # masks are built here, whatever they are for, and any backend will do for that
    blocks = None if device == "cpu" else default_block_size(device)
    built = dataclasses.replace(recipe, block_size=recipe.block_size or blocks, backend="auto")
    head_dim, number = model_config.description.heads(transformer)[1], str(dtype).removeprefix("torch.")
    rates = rates or measured_speed(device, number, head_dim, model_config.name)
    # on a CPU what runs here; another device is taken to run what is meant for it
    elsewhere = recipe.backend == "auto" and device != "cpu"
    used = fastest_backend(device) if elsewhere else backend(recipe, device, dtype, head_dim)
    rates = rates.of_backend(used, device)
    cpu, adapted = torch.device("cpu"), _adapted(recipe, model_config, transformer)
    binding = Binding(transformer, model_config.description, built, StepTracker(), cpu, rates)
    if shift is not None:
        model_config = dataclasses.replace(model_config, shift=float(positive("shift", shift)))
    levels = model_config.noise_levels(steps, layout.visual_len) if recipe.needs_noise else [None] * steps
    moments = [Moment(step, level, steps) for step, level in enumerate(levels)]
    sparse = [moment for moment in moments if not recipe.is_dense_step(moment.step, steps, moment.sigma)]
    changes = _changes(binding, sparse or moments[-1:])
    of_steps = [_at(binding, layout, moment, count) for moment, count in changes.items()]
    found = of_steps[-1].found
    flops = model_config.flops(transformer, grid)
    beside = flops_beside(binding, of_steps, flops)
    lora = 0 if adapted is None else _with_lora(model_config, transformer, grid, adapted) - flops.total
    dense_steps = steps - len(sparse)
    pairs = zip(found.attentions or (), found.layouts, strict=found.attentions is not None)
    attention, of_mask = next((pair for pair in pairs if pair[0] is not None), (None, layout))
    return Plan(
        model=model_config.name,
        family=model_config.family,
        recipe=recipe.name or recipe.tag,
        size=pixels,
        grid=grid,
        tokens=layout.seq_len,
        text_tokens=model_config.text_len,
        heads=binding.heads,
        head_dim=head_dim,
        device=device,
        dtype=number,
        block_size=found.block_size,
        steps=steps,
        dense_steps=dense_steps,
        noise_levels=tuple(levels) if recipe.needs_noise else None,
        density=_mean((at.found.over_layers(at.found.densities), at.steps) for at in of_steps),
        block_density=_mean((at.found.over_layers(at.found.block_densities), at.steps) for at in of_steps),
        sampled=found.sampled or None,
        layers=_layers(of_steps[-1].layers, found),
        orders=found.orders,
        flops=flops,
        flops_beside=round(beside),
        **speedups(binding, of_steps, flops, rates, dense_steps / steps, lora),
        memory=_memory(binding, of_steps, dtype),
        rates=rates,
        notes=(
            *notes_of(model_config, binding, rates, layout.seq_len, found.sampled, device),
            *([] if adapted is None else [_of_adapter(adapted, lora, flops)]),
            *([_of_beside(binding, beside, flops)] if beside else []),
        ),
        head_works=lambda: dict(zip(binding.modules, found.head_works(), strict=True)),
        layer_attention=attention,
        layout=of_mask,
    )


# -- what was asked ------------------------------------------------------------------------------------------


def chosen_model(model: str | ModelConfig | None, family: str | None, variant: str | None) -> ModelConfig:
    """A model, or a published one of a family.

    Raises:
        ValueError: neither, both, or one that is not known.
    """
    if (model is None) == (family is None):
        raise ValueError(
            "give either `model` or `family`, " + ("got neither" if model is None else "got both")
        )
    if family is not None:
        return published(family, variant)
    if variant is not None:
        raise ValueError(f"`variant` goes with `family`, got {variant!r} with `model`")
    return model if isinstance(model, ModelConfig) else of_model(model)


def _pixels(model_config: ModelConfig, size: tuple[int, int] | None, frames: int | None) -> Size:
    usual = model_config.size
    width, height = size or (usual[2], usual[1])
    chosen = (usual[0] if frames is None else frames, height, width)
    if min(chosen) < 1:
        raise ValueError(f"frames, height and width must be positive, got {chosen}")
    return chosen


def _adapted(recipe: Recipe, model_config: ModelConfig, transformer: nn.Module) -> Adapted | None:
    """The recipe's adapter, checked against every transformer of the model, which are alike; one of them."""
    if not isinstance(recipe.adapter, Adapter):
        return None
    parts = recipe.adapter.parts_of(TRANSFORMERS[: model_config.transformers])
    checked = [Adapted(transformer, part, recipe.adapter.file()) for part in parts.values()]
    return checked[0]


def _with_lora(model_config: ModelConfig, transformer: nn.Module, grid: Size, adapted: Adapted) -> int:
    """FLOPs of a call with the adapter."""
    layers = {n: own for n, own in adapted.part.layers.items() if isinstance(own, LowRank)}
    if not layers:  # whole weights are multiplied in the place of the model's own
        return model_config.flops(transformer, grid).total
    meta = {
        name: (
            torch.empty(own.rank, own.inputs, device="meta"),
            torch.empty(own.outputs, own.rank, device="meta"),
        )
        for name, own in layers.items()
    }
    adapted.attach(meta, {})
    try:
        return model_config.count_flops(transformer, grid).total
    finally:
        adapted.detach()


def _of_adapter(adapted: Adapted, lora: int, flops: Flops) -> str:
    return (
        f"{adapted.describe()}, {lora / flops.total:.2%} more FLOPs at every step, counted in the speed-ups"
    )


def _of_beside(binding: Binding, beside: float, flops: Flops) -> str:
    names = dict.fromkeys(v.rest for p in binding.recipe.patterns for v in p.variants if v.rest)
    return (
        f"{' and '.join(names)}: {beside / flops.total:.2%} more FLOPs at a sparse step, counted in the "
        "speed-ups with learned weights or without"
    )


# -- what it does --------------------------------------------------------------------------------------------


def _changes(binding: Binding, moments: list[Moment]) -> Counter[Moment | None]:
    """Moments between which layers change, of each how many steps do as the one at it."""
    used = [pattern for layer in binding.layers for pattern in layer.patterns]
    if not any(p.by_noise or (p.per_head and len(p.variants) > 1) for p in used):
        return Counter({None: len(moments)})
    alike: dict[tuple[LayerPatterns, ...], list[Moment]] = {}
    for moment in moments:
        alike.setdefault(tuple(plans(binding, moment)), []).append(moment)
    return Counter({same[0]: len(same) for same in alike.values()})


def _at(binding: Binding, layout: TokenLayout, moment: Moment | None, steps: int) -> AtSteps:
    return AtSteps(layer_densities(binding, layout, moment), plans(binding, moment), steps)


def _mean(values: Iterable[tuple[float, int]]) -> float:
    """Of (value, weight) pairs."""
    pairs = list(values)
    total = sum(weight for _, weight in pairs)
    return sum(value * (weight / total) for value, weight in pairs)


def _layers(layers: list[LayerPatterns], found: LayerDensities) -> tuple[Layers, ...]:
    groups: dict[tuple, list[str]] = {}
    columns = (layers, found.layouts, found.densities, found.block_densities, found.dense_reasons)
    for layer, layout, density, blocks, dense in zip(*columns, strict=True):
        counts = Counter(map(str, layer.heads))
        pattern = ", ".join(f"{n} heads {p}" if len(counts) > 1 else p for p, n in counts.items())
        pattern += layer.options
        key = (None if dense else pattern or None, layout.seq_len, density, blocks, dense or layer.reason)
        groups.setdefault(key, []).append(layer.name)
    return tuple(Layers(tuple(names), *key) for key, names in groups.items())


def _memory(binding: Binding, of_steps: list[AtSteps], dtype: torch.dtype) -> Memory:
    layouts = of_steps[-1].found.layouts
    tokens = max(2 * (layout.seq_len + layout.kv_len) for layout in layouts)  # q, output, k, v
    masks = None
    if all(at.found.attentions is not None for at in of_steps):
        different = {attention for at in of_steps for attention in at.found.attentions or ()} - {None}
        masks = sum(attention.nbytes for attention in different)
    parameters = sum(p.numel() for p in binding.transformer.parameters())
    return Memory(
        weights=parameters * dtype.itemsize,
        qkv_and_output=tokens * binding.heads * binding.head_dim * dtype.itemsize,
        masks=masks,
        scores_never_made=max(layout.pairs for layout in layouts) * binding.heads * dtype.itemsize,
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        data = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Flops):
            data |= {"attention": value.attention, "rest": value.rest}
        return data
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
