"""A table of what is accelerated in a pipeline, what is not, and why."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .binding import Binding
from .layers import LayerPlan
from .patterns import Pattern
from .pipelines import family_of
from .recipe import Recipe
from .switch import Handle, _transformers, handle_of

_COLUMNS = ("layer", "pattern", "backend", "density", "block density", "dense steps", "note")


@dataclass(frozen=True)
class Summary:
    """What `summary` returns: `str()` is a table, `rows` one dict per layer for programs.

    Keys of a row: `transformer`, `layer`, `pattern` and `backend` (None where the model's own attention
    runs), `density` and `block_density` (None before the geometry is known), `dense_steps`, `note`.
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
        for name, transformer in _transformers(target).items():
            family = family_of(transformer)
            titles.append(f"{name}: {type(transformer).__name__} ({family.name}), not accelerated")
            rows += [
                _row(name, LayerPlan(layer, reason="not enabled")) for layer in family.layers(transformer)
            ]
        return Summary("\n".join(titles), rows)
    rows = [row for name, binding in handle.bindings.items() for row in _rows(name, binding)]
    return Summary("\n".join(_titles(handle)), rows)


def _titles(handle: Handle) -> list[str]:
    titles = [f"recipe {handle.recipe.tag}"]
    for name, binding in handle.bindings.items():
        line = f"{name}: {type(binding.transformer).__name__} ({binding.family.name}), "
        if not binding.sparse_layers:
            line += "nothing to accelerate"
        elif binding.geometry is None:
            line += "geometry and densities unknown until the first run"
        else:
            layout = binding.geometry.layout
            line += f"grid {' x '.join(map(str, layout.grid))} tokens"
            line += f" + {layout.text_len} text" if layout.text_len else ""
            line += (
                ", tokens in model order" if binding.geometry.permutation is None else ", tokens reordered"
            )
        titles.append(line)
        if binding.sparse_layers:
            titles.append(binding.rates().describe_break_even())
        if binding.branch is not None:
            titles.append(binding.branch.describe())
    if handle.run_density is not None:
        stats = handle.stats()
        steps = f"{len(stats['dense_steps'])} of {stats['steps'] or 'unknown'} steps dense"
        titles.append(
            f"latest run: density {stats['density']:.4f}, in blocks {stats['block_density']:.4f}, {steps}"
        )
    return titles


def _rows(name: str, binding: Binding) -> list[dict[str, Any]]:
    geometry, rows = binding.geometry, []
    automatic = "auto: " if binding.recipe.backend == "auto" else ""
    backend = f"{automatic}{binding.backend}" if binding.sparse_layers else None
    temporal = {} if geometry is None else binding.temporal_heads()
    for index, plan in enumerate(binding.plans):
        row = _row(name, plan, binding.recipe)
        if plan.heads:
            row["backend"] = backend
        if plan.heads and geometry is not None and geometry.kept[index]:
            row = _row(name, LayerPlan(plan.name, reason=geometry.kept[index]))
        elif plan.heads and geometry is not None:
            row |= {"density": geometry.densities[index], "block_density": geometry.block_densities[index]}
        if plan.name in temporal:
            row["note"] = f"{temporal[plan.name]:.0%} temporal heads in the latest call"
        if binding.branch is not None and (perturbed := binding.branch.layers.get(plan.name)):
            row["note"] = "; ".join(filter(None, [row["note"], f"guidance perturbs {len(perturbed)} heads"]))
        rows.append(row)
    return rows


def _row(transformer: str, plan: LayerPlan, recipe: Recipe | None = None) -> dict[str, Any]:
    """One layer; the model's own attention computes everything."""
    row = {"transformer": transformer, "layer": plan.name, "pattern": None, "backend": None, "density": 1.0}
    row |= {"block_density": 1.0, "dense_steps": "all", "note": f"model's own attention: {plan.reason}"}
    if plan.heads:
        counts = {_pattern(p): plan.heads.count(p) for p in plan.patterns}
        mixed = ", ".join(f"{count} heads {pattern}" for pattern, count in counts.items())
        row |= {"pattern": mixed if len(counts) > 1 else next(iter(counts))}
        row |= {"density": None, "block_density": None, "dense_steps": _steps(recipe), "note": ""}
    return row


def _pattern(pattern: Pattern) -> str:
    """The pattern with the fields that are not at their defaults."""
    shown = (f"{f.name}={v!r}" for f in fields(pattern) if (v := getattr(pattern, f.name)) != f.default)
    return f"{type(pattern).__name__}({', '.join(shown)})"


def _steps(recipe: Recipe) -> str:
    spec = recipe.dense_steps
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
