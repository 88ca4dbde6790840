"""A table of what is accelerated in a pipeline, what is not, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from .masks.chunk_layout import ChunkLayout
from .patterns import Pattern
from .pipelines.families import family_of
from .recipe.layer_patterns import LayerPatterns
from .recipe.noise import NoiseRange
from .recipe.recipe import Recipe
from .runtime.geometry import Geometry
from .runtime.switching import Handle, handle_of, transformers_of

_COLUMNS = ("layer", "pattern", "backend", "density", "block density", "dense steps", "note")


@dataclass(frozen=True)
class Summary:
    """What `summary` returns: `str()` is a table, `rows` one dict per layer for programs.

    Keys of a row: `transformer`, `layer`, `pattern` and `backend` (None where the model's own attention
    runs), `density` and `block_density` (None before the geometry is known), `dense_steps`, `note`,
    `tail`, `quantization`, and `density_by_step`: of a layer that chooses by content what it computed at each
    of its steps in the latest run, of which `density` and `block_density` then are the means; empty for
    others.
    """

    title: str
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        cells = [_COLUMNS, *(_cells(first, last) for first, last in _merged(self.rows))]
        widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([self.title, "", lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def summary(target: Any) -> Summary:
    """What is accelerated in a pipeline or transformer.

    Raises:
        TypeError: a target that is not a supported pipeline or transformer.
    """
    handle = handle_of(target)
    if handle is None:
        rows, titles = [], []
        for name, transformer in transformers_of(target).items():
            family = family_of(transformer)
            titles.append(f"{name}: {type(transformer).__name__} ({family.name}), not accelerated")
            rows += [
                _row(name, LayerPatterns(layer, reason="not enabled"))
                for layer in family.found_layers(transformer)
            ]
        return Summary("\n".join(titles), rows)
    rows = [row for name in handle.bindings for row in _rows(handle, name)]
    return Summary("\n".join(_titles(handle)), rows)


def _titles(handle: Handle) -> list[str]:
    titles = [f"recipe {handle.recipe.tag}"]
    titles += [note for pattern in handle.recipe.patterns for note in pattern.notes]
    for name, binding in handle.bindings.items():
        line = f"{name}: {type(binding.transformer).__name__} ({binding.family.name}), "
        if not binding.sparse_layers:
            line += "nothing to accelerate"
        elif binding.geometry is None:
            line += "geometry and densities unknown until the first run"
        else:
            layout = binding.geometry.layout
            line += f"grid {' x '.join(map(str, layout.grid))} tokens"
            line += f" + {layout.text_len} {binding.family.text_name}" if layout.text_len else ""
            if layout.anchor is not None:
                line += f" + {layout.anchor_len} {binding.family.beside}, attended densely"
            if isinstance(layout, ChunkLayout):
                line += f", chunk {layout.present} of {len(layout.chunks)}: {layout.seq_len} queries, "
                line += f"{layout.kv_len} keys"
            line += (
                ", tokens in model order" if binding.geometry.permutation is None else ", tokens reordered"
            )
        titles.append(line)
        if binding.sparse_layers and binding.family.stays_dense:
            titles.append(f"dense under every recipe: {binding.family.stays_dense}")
        if binding.sparse_layers:
            titles.append(binding.speed().describe_break_even())
        if binding.adapted is not None:
            titles.append(binding.adapted.describe())
        if binding.shards is not None:
            titles.append(
                f"{binding.shards}, sent in the latest run: {handle.latest.sent_bytes / 2**20:.1f} MiB"
            )
            titles += _balance(binding.geometry)
        if binding.branch is not None:
            forwards = binding.branch.run(handle.latest.run).forwards
            titles.append(binding.branch.describe(forwards))
    if handle.run_density is not None:
        stats = handle.stats()
        steps = f"{len(stats['dense_steps'])} of {stats['steps'] or 'unknown'} steps dense"
        titles.append(
            f"latest run: density {stats['density']:.4f}, in blocks {stats['block_density']:.4f}, {steps}"
        )
        titles.append(f"by step: {_stretches(stats['step_densities'])}")
    return titles


def _balance(geometry: Geometry | None) -> list[str]:
    """How evenly the work of heads that differ is shared, where some do."""
    found = [] if geometry is None else list(geometry.balances.values())
    if not found:
        return []
    before, after = (fmean(getattr(one, name) for one in found) for name in ("neighbours", "balanced"))
    return [
        f"heads of {len(found)} layers are dealt out by their work: the busiest process computes {after:.2f} "
        f"times the mean, with neighbouring heads {before:.2f}"
    ]


def _rows(handle: Handle, name: str) -> list[dict[str, Any]]:
    binding = handle.bindings[name]
    geometry, rows = binding.geometry, []
    automatic = "auto: " if binding.recipe.backend == "auto" else ""
    formats = dict.fromkeys(layer.quantization for layer in binding.layers if layer.heads)
    backends = {format: f"{automatic}{binding.backend_for(format)}" for format in formats}
    temporal = handle.latest.temporal_heads(name)
    for index, layer in enumerate(binding.layers):
        row = _row(name, layer, binding.recipe)
        if layer.heads:
            row["backend"] = backends[layer.quantization]
        if layer.heads and geometry is not None and geometry.dense_reasons[index]:
            row = _row(name, LayerPatterns(layer.name, reason=geometry.dense_reasons[index]))
        elif layer.heads and geometry is not None:
            row |= {"density": geometry.densities[index], "block_density": geometry.block_densities[index]}
        elif geometry is not None and geometry.attentions[index] is not None:
            row |= {"density": geometry.densities[index], "block_density": geometry.block_densities[index]}
            row |= {
                "backend": backends.get(None, binding.backend),
                "note": f"chunk-causal, as the model itself: {layer.reason}",
            }
        if steps := handle.latest.achieved_by_step(name, layer.name):
            row |= _achieved(steps, geometry.densities[index])
        if geometry is not None and (balance := geometry.balances.get(layer.name)):
            own = ", ".join(map(str, balance.groups[binding.shards.rank]))
            work = f"at most {balance.balanced:.2f} x the mean work, neighbours {balance.neighbours:.2f} x"
            row["note"] = "; ".join(filter(None, [row["note"], f"heads {own} here: {work}"]))
        if layer.name in temporal:
            row["note"] = f"{temporal[layer.name]:.0%} temporal heads in the latest call"
        if binding.branch is not None and (perturbed := binding.branch.layers.get(layer.name)):
            row["note"] = "; ".join(filter(None, [row["note"], f"guidance perturbs {len(perturbed)} heads"]))
        rows.append(row)
    return rows


def _achieved(steps: dict[int, list[float]], aim: float) -> dict[str, Any]:
    """What a layer's row says of what it computed at its steps, [density, block density] each."""
    density, blocks = (sum(column) / len(steps) for column in zip(*steps.values(), strict=True))
    by_step = {step: one for step, (one, _) in steps.items()}
    least, most = min(by_step.values()), max(by_step.values())
    note = f"chosen by content: {least:.3f} to {most:.3f} in {len(steps)} steps, aims at {aim:.3f}"
    return {"density": density, "block_density": blocks, "density_by_step": by_step, "note": note}


def _row(transformer: str, layer: LayerPatterns, recipe: Recipe | None = None) -> dict[str, Any]:
    """One layer; the model's own attention computes everything."""
    row = {"transformer": transformer, "layer": layer.name, "pattern": None, "backend": None, "density": 1.0}
    row |= {"block_density": 1.0, "dense_steps": "all", "note": f"model's own attention: {layer.reason}"}
    row |= {"density_by_step": {}, "tail": None, "quantization": None}
    if layer.heads:
        counts = Counter(map(_pattern, layer.heads))
        mixed = ", ".join(f"{n} heads {p}" if len(counts) > 1 else p for p, n in counts.items())
        row |= {"pattern": mixed + layer.options, "tail": layer.tail, "quantization": layer.quantization}
        row |= {"density": None, "block_density": None, "dense_steps": _steps(recipe), "note": ""}
    return row


def _pattern(pattern: Pattern) -> str:
    """The pattern with the fields that are not at their defaults; of a calibration what it chose."""
    if pattern.per_head:
        return str(pattern)
    values = ((f.name, v) for f in fields(pattern) if (v := getattr(pattern, f.name)) != f.default)
    return f"{type(pattern).__name__}({', '.join(f'{name}={_value(v)}' for name, v in values)})"


def _value(value: Any) -> str:
    """As `repr`, patterns within it as `_pattern`."""
    if isinstance(value, tuple) and any(isinstance(one, tuple | Pattern) for one in value):
        return f"({', '.join(map(_value, value))})"
    return _pattern(value) if isinstance(value, Pattern) else repr(value)


def _stretches(densities: dict[int, float]) -> str:
    """Densities of steps, those of neighbours that are the same in one: `"0-1 1.0000, 2-7 0.2500"`."""
    stretches: list[tuple[int, int, str]] = []
    for step, density in densities.items():
        shown = f"{density:.4f}"
        if stretches and stretches[-1][1:] == (step - 1, shown):
            stretches[-1] = (stretches[-1][0], step, shown)
        else:
            stretches.append((step, step, shown))
    return ", ".join(f"{a if a == b else f'{a}-{b}'} {shown}" for a, b, shown in stretches)


def _steps(recipe: Recipe) -> str:
    spec = recipe.dense_steps
    if isinstance(spec, NoiseRange):
        return str(spec)
    if isinstance(spec, tuple):
        return ", ".join(map(str, spec)) or "none"
    if isinstance(spec, float):
        return f"first {spec:.0%}" if spec else "none"
    return f"first {spec}" if spec else "none"


def _merged(rows: list[dict[str, Any]]) -> list[tuple[dict, dict]]:
    """(first, last) row of each stretch of equal neighbours of one transformer and group."""
    stretches: list[tuple[dict, dict]] = []
    for row in rows:
        if stretches and _key(stretches[-1][1]) == _key(row):
            stretches[-1] = (stretches[-1][0], row)
        else:
            stretches.append((row, row))
    return stretches


def _key(row: dict[str, Any]) -> dict[str, Any]:
    group, _, *part = row["layer"].split(".")
    return row | {"layer": (group, *part)}


def _cells(first: dict[str, Any], last: dict[str, Any]) -> tuple[str, ...]:
    group, number, *part = first["layer"].split(".")
    through = "" if first is last else f"-{last['layer'].split('.')[1]}"
    name = ".".join([group, number + through, *part])
    prefix = "" if first["transformer"] == "transformer" else f"{first['transformer']}: "
    numbers = ["?" if first[k] is None else f"{first[k]:.4f}" for k in ("density", "block_density")]
    pattern, backend = first["pattern"] or "-", first["backend"] or "-"
    return (prefix + name, pattern, backend, *numbers, first["dense_steps"], first["note"])
