"""What a recipe would do to a model at a size: densities, speed-up and memory, without weights or a run.

The prediction has two terms. Attention of a layer takes block density / efficiency of its dense time, and
what a call takes whatever it computes, where both are measured (`dit_accel.rates`); where they are not, only
the ideal of an efficiency of 1 is given. The rest of a step takes its FLOPs at a rate relative to dense
attention that is measured for the model or else assumed to be 1. Times cancel out of every speed-up, so none
is predicted.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .binding import Binding
from .blockmask import BlockMask
from .blueprint import Blueprint, Flops, Size, of_model, published
from .builder import HILBERT_UP_TO
from .choice import HeadChoice
from .clock import Clock
from .geometry import Geometry, backend, visual_permutation
from .kernels import default_block_size, fastest_backend
from .layout import TokenLayout
from .patterns import Dense, Pattern, SparseVideoGen
from .rates import Rates, measured
from .recipe import Recipe, resolve

ASSUMED_REST = 1.0


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
class Order:
    """Block density of one pattern under one token order; of `"auto"`, `takes` says which it is."""

    pattern: str
    tokens: int
    order: str
    block_density: float
    takes: str = ""


@dataclass(frozen=True)
class Speedup:
    """How many times faster than dense: what is predicted, its range, and the ideal.

    `low`, `predicted` and `high` follow the least, median and most efficiency measured, and are None where
    none is; `ideal` is for an efficiency of 1, whatever was measured.
    """

    low: float | None
    predicted: float | None
    high: float | None
    ideal: float


@dataclass(frozen=True)
class Memory:
    """Bytes of the weights, of q, k, v and the output of one layer (batch of one), of all block masks, and of
    the S x S scores of one layer, which are never made."""

    weights: int
    qkv_and_output: int
    masks: int
    scores_never_made: int


@dataclass(frozen=True)
class Plan:
    """What `plan` returns.

    Attributes:
        recipe: its name, or its tag where it has none.
        size: frames, height, width in pixels; `grid` the same in tokens.
        tokens: in an attention layer, its text included; `text_tokens` are those of a prompt.
        steps, dense_steps: sampler steps of a run, and how many of them are dense.
        density, block_density: of all layers together at a sparse step.
        layers, orders: per group of layers, and per pattern and token order.
        flops: of one call of the transformer, dense.
        attention, step, run: times faster than dense: attention of the sparse layers, a sparse step, a run.
        notes: what the predictions rest on.
        mask, layout: of the first sparse layer; None and the model's layout where nothing is sparse.
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
    density: float
    block_density: float
    layers: tuple[Layers, ...]
    orders: tuple[Order, ...]
    flops: Flops
    attention: Speedup
    step: Speedup
    run: Speedup
    memory: Memory
    rates: Rates
    notes: tuple[str, ...]
    mask: BlockMask | HeadChoice | None = field(repr=False, compare=False)
    layout: TokenLayout = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the mask, as plain data."""
        shown = (f.name for f in dataclasses.fields(self) if f.name not in ("mask", "layout"))
        return {name: _plain(getattr(self, name)) for name in shown}


def plan(
    recipe: Recipe | Pattern | str | Path,
    *,
    model: str | Blueprint | None = None,
    family: str | None = None,
    variant: str | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    steps: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rates: Rates | None = None,
) -> Plan:
    """What a recipe would do to a model at a size. Runs nothing and needs no weights and no such device.

    Args:
        recipe: a recipe, a pattern, a preset's name or a recipe file.
        model: a bundled model, a local pipeline folder or a `Blueprint`.
        family, variant: a published model instead, of the family's reference if no variant is named.
        size: (width, height) in pixels; by default the model's usual size.
        frames: of a video.
        steps: sampler steps of a run.
        device: device type that is planned for, `"cpu"` or `"cuda"`.
        dtype: number format that is planned for.
        rates: what to predict from, instead of the measured results that come with the library.

    Raises:
        ValueError: no such model, a size it would round, a recipe of another family, a pattern that does not
            fit the size.
    """
    blueprint = _blueprint(model, family, variant)
    recipe = resolve(recipe)
    recipe.check_family(blueprint.family, f"{blueprint.name} is of {blueprint.family!r}")
    pixels = _pixels(blueprint, size, frames)
    steps = blueprint.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"`steps` must be a positive integer, got {steps}")
    transformer = blueprint.transformer()
    grid = blueprint.grid(transformer, pixels)
    layout = blueprint.layout(grid)
    # masks are built here, whatever they are for, and any backend will do for that
    blocks = None if device == "cpu" else default_block_size(device)
    built = dataclasses.replace(recipe, block_size=recipe.block_size or blocks, backend="auto")
    head_dim, number = transformer.config.attention_head_dim, str(dtype).removeprefix("torch.")
    rates = rates or measured(device, number, head_dim, blueprint.name)
    # on a CPU what runs here; another device is taken to run what is meant for it
    elsewhere = recipe.backend == "auto" and device != "cpu"
    used = fastest_backend(device) if elsewhere else backend(recipe, device, dtype, head_dim)
    rates = rates.of_backend(used, device)
    binding = Binding(transformer, blueprint.description, built, Clock(), torch.device("cpu"), rates)
    geometry = binding.geometry_of(layout)
    flops = blueprint.flops(transformer, grid)
    dense_steps = sum(recipe.is_dense_step(step, steps) for step in range(steps))
    sparse = [pair for pair in zip(geometry.masks, geometry.layouts, strict=True) if pair[0] is not None]
    mask, of_mask = sparse[0] if sparse else (None, layout)
    return Plan(
        model=blueprint.name,
        family=blueprint.family,
        recipe=recipe.name or recipe.tag,
        size=pixels,
        grid=grid,
        tokens=layout.seq_len,
        text_tokens=blueprint.text_len,
        heads=binding.heads,
        head_dim=head_dim,
        device=device,
        dtype=number,
        block_size=geometry.block_size,
        steps=steps,
        dense_steps=dense_steps,
        density=geometry.over_layers(geometry.densities),
        block_density=geometry.over_layers(geometry.block_densities),
        layers=_layers(binding, geometry),
        orders=_orders(binding, geometry),
        flops=flops,
        **_speedups(binding, geometry, flops, rates, dense_steps / steps),
        memory=_memory(binding, geometry, dtype),
        rates=rates,
        notes=_notes(blueprint, binding, rates, layout.seq_len),
        mask=mask,
        layout=of_mask,
    )


# -- what was asked ------------------------------------------------------------------------------------------


def _blueprint(model: str | Blueprint | None, family: str | None, variant: str | None) -> Blueprint:
    if (model is None) == (family is None):
        raise ValueError(
            "give either `model` or `family`, " + ("got neither" if model is None else "got both")
        )
    if family is not None:
        return published(family, variant)
    if variant is not None:
        raise ValueError(f"`variant` goes with `family`, got {variant!r} with `model`")
    return model if isinstance(model, Blueprint) else of_model(model)


def _pixels(blueprint: Blueprint, size: tuple[int, int] | None, frames: int | None) -> Size:
    usual = blueprint.size
    width, height = size or (usual[2], usual[1])
    chosen = (usual[0] if frames is None else frames, height, width)
    if min(chosen) < 1:
        raise ValueError(f"frames, height and width must be positive, got {chosen}")
    return chosen


# -- what it does --------------------------------------------------------------------------------------------


def _layers(binding: Binding, geometry: Geometry) -> tuple[Layers, ...]:
    groups: dict[tuple, list[str]] = {}
    columns = (binding.plans, geometry.layouts, geometry.densities, geometry.block_densities, geometry.kept)
    for layer, layout, density, blocks, kept in zip(*columns, strict=True):
        counts = {str(p): layer.heads.count(p) for p in layer.patterns}
        pattern = ", ".join(f"{n} heads {p}" if len(counts) > 1 else p for p, n in counts.items())
        key = (None if kept else pattern or None, layout.seq_len, density, blocks, kept or layer.reason)
        groups.setdefault(key, []).append(layer.name)
    return tuple(Layers(tuple(names), *key) for key, names in groups.items())


def _orders(binding: Binding, geometry: Geometry) -> tuple[Order, ...]:
    """Every pattern of the recipe under every order worth trying on its layout."""
    used = dict.fromkeys(
        (pattern, layout)
        for layer, layout in zip(binding.plans, geometry.layouts, strict=True)
        for pattern in layer.patterns
        if not isinstance(pattern, Dense)
    )
    return tuple(order for key in used for order in _orders_of(*key, geometry.block_size))


def _orders_of(pattern: Pattern, layout: TokenLayout, blocks: tuple[int, int]) -> list[Order]:
    if isinstance(pattern, SparseVideoGen):
        density = pattern.head_mask(layout, blocks).block_density
        return [Order(str(pattern), layout.seq_len, "of each head", density)]
    names = ["raster", "tile", *(["hilbert"] if layout.visual_len <= HILBERT_UP_TO else [])]
    masks = {name: pattern.block_mask(layout, blocks, name) for name in names}
    auto = pattern.block_mask(layout, blocks, "auto")
    chosen = visual_permutation(auto, layout)
    same = (name for name, mask in masks.items() if torch.equal(visual_permutation(mask, layout), chosen))
    rows = [Order(str(pattern), layout.seq_len, name, mask.block_density) for name, mask in masks.items()]
    takes = next(same, "the pattern's own")
    return [*rows, Order(str(pattern), layout.seq_len, "auto", auto.block_density, takes)]


def _speedups(
    binding: Binding, geometry: Geometry, flops: Flops, rates: Rates, dense_share: float
) -> dict[str, Speedup]:
    """Of attention in the sparse layers, of a sparse step, and of a run with its dense steps."""
    layers = zip(binding.plans, geometry.masks, geometry.layouts, geometry.block_densities, strict=True)
    sparse = paid = calls = 0.0  # FLOPs; of calls those that dense attention makes in their fixed time
    for layer, mask, layout, density in layers:
        if mask is not None:
            full = flops.layers[layer.name]
            sparse += full
            paid += full * density
            calls += rates.fixed * full / (binding.heads * layout.seq_len**2)
    kept = flops.attention - sparse + flops.rest / (rates.rest or ASSUMED_REST)

    def at(efficiency: float, calls: float) -> tuple[float, float, float]:
        attention = sparse / (paid / efficiency + calls) if paid else 1.0
        step = (sparse + kept) / (paid / efficiency + calls + kept)
        return attention, step, 1 / (dense_share + (1 - dense_share) / step)

    measured_ones = rates.efficiency or ()
    found = [at(efficiency, calls) for efficiency in measured_ones] or [(None,) * 3] * 3
    return {
        name: Speedup(*(values[i] for values in found), ideal=at(1.0, 0.0)[i])
        for i, name in enumerate(("attention", "step", "run"))
    }


def _memory(binding: Binding, geometry: Geometry, dtype: torch.dtype) -> Memory:
    tokens = max(layout.seq_len for layout in geometry.layouts)
    masks = {id(mask): mask for mask in geometry.masks if mask is not None}
    parameters = sum(p.numel() for p in binding.transformer.parameters())
    return Memory(
        weights=parameters * dtype.itemsize,
        qkv_and_output=4 * tokens * binding.heads * binding.head_dim * dtype.itemsize,
        masks=sum(_bytes(mask) for mask in masks.values()),
        scores_never_made=tokens**2 * binding.heads * dtype.itemsize,
    )


def _bytes(mask: BlockMask | HeadChoice) -> int:
    values = (getattr(mask, f.name) for f in dataclasses.fields(mask))
    own = sum(v.nbytes for v in values if isinstance(v, torch.Tensor))
    return own + (_bytes(mask.mask) if isinstance(mask, HeadChoice) else 0)


def _notes(blueprint: Blueprint, binding: Binding, rates: Rates, tokens: int) -> tuple[str, ...]:
    notes = []
    if rates.efficiency is None:
        notes.append(
            f"{rates.source}: only ideal speed-ups are given, with blocks at the cost of dense attention's"
        )
    else:
        least, middle, most = rates.efficiency
        notes.append(
            f"attention from a measured speed-up x block density of {middle:.2f} ({least:.2f} to {most:.2f}; "
            f"{rates.source}): it pays below a block density of {middle:.2f}"
        )
        if tokens < rates.shortest:
            notes.append(
                f"{tokens} tokens are fewer than were measured for this (at least {rates.shortest}): what is "
                "predicted for attention may be far off"
            )
    if rates.rest is None:
        notes.append(
            f"the rest of a step is not measured for {blueprint.name}: "
            "it is assumed to run at dense attention's FLOP/s"
        )
    else:
        notes.append(f"the rest of a step runs at {rates.rest:.2f} of dense attention's FLOP/s, as measured")
    notes.append(rates.describe_break_even())
    if any(isinstance(p, SparseVideoGen) for layer in binding.plans for p in layer.patterns):
        notes.append("what heads take to choose their kind in each call is not counted")
    if blueprint.transformers > 1:
        notes.append(
            f"{blueprint.transformers} transformers of this size, one at each step; memory is of one"
        )
    return tuple(notes)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        data = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Flops):
            data |= {"attention": value.attention, "rest": value.rest}
        return data
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
