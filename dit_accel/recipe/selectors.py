"""Layer selectors: which attention layers, and which heads of them, an entry of a recipe means.

The grammar, with layers named by the family (FLUX: `double.0` ..., `single.0` ...; Wan: `blocks.0` ...):

    selector := entry ("," entry)*
    entry    := where | where "/" heads | heads
    where    := layers | layers "." part | part
    layers   := "all" | group | group "." range | range      a bare range counts through all layers
    heads    := "heads." range
    range    := n | first "-" last                           inclusive; a negative number counts from the end

A second attention is a part of its layer: a dual layer of SD3.5 is `blocks.0` and `blocks.0.attn2`. Layers
are counted without parts, in selectors and `dense_layers`, and naming a layer names its parts as well.

Examples: `"all"`, `"double"`, `"double.0-18"`, `"single.3"`, `"blocks.-1"`, `"0-56"`, `"0-3,-1"`,
`"heads.0-3"`, `"single/heads.0-3,single/heads.7"`, `"attn2"`, `"blocks.0-5.attn2"`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dit_accel.arguments import shown
from dit_accel.layer_names import flat_indices, groups, split_part

_RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?")


def select(selector: str, layers: Sequence[str], heads: int) -> list[tuple[int, tuple[int, ...]]]:
    """The (position in `layers`, head indices) pairs that a selector names.

    Args:
        selector: text of the grammar above.
        layers: names of all layers in flat order, such as `["double.0", ..., "single.37"]`, parts last.
        heads: number of heads of every layer.

    Raises:
        ValueError: text outside the grammar, or an entry that matches nothing.
    """
    if not isinstance(selector, str):
        raise ValueError(f"a layer selector must be text, got {shown(selector)}")
    chosen = []
    for entry in selector.split(","):
        where, _, which = entry.strip().partition("/")
        if where.startswith("heads.") and not which:
            where, which = "all", where
        if which and not which.startswith("heads."):
            raise ValueError(
                f"layer selector {shown(selector)}: expected `heads.` and a range after `/`, got "
                f"{shown(which)}"
            )
        head_range = which.removeprefix("heads.") if which else f"0-{heads - 1}"
        head_indices = tuple(_indices(head_range, heads, f"layer selector {shown(selector)}: head"))
        chosen += [(layer, head_indices) for layer in _layers(where, selector, layers)]
    return chosen


def assign(attention: Mapping[str, Any], layers: Sequence[str], heads: int) -> list[tuple[Any, ...]]:
    """What each head of each layer is assigned: one tuple of `heads` values per layer, None where nothing is.

    Later entries of `attention` override earlier ones.

    Raises:
        ValueError: see `select`.
    """
    table = [[None] * heads for _ in layers]
    for selector, value in attention.items():
        for layer, head_indices in select(selector, layers, heads):
            for head in head_indices:
                table[layer][head] = value
    return [tuple(row) for row in table]


def describe(layers: Sequence[str]) -> str:
    """The layers in the grammar's own words: `"double.0-18, single.0-37"`."""
    parts = [f"{name.partition('.')[0]}.{part}" for name in layers if (part := split_part(name)[1])]
    counted = [f"{group}.0-{len(members) - 1}" for group, members in groups(layers).items()]
    return ", ".join([*counted, *dict.fromkeys(parts)])


def _layers(where: str, selector: str, layers: Sequence[str]) -> list[int]:
    """Positions in `layers` of what an entry names."""
    parts = [split_part(name)[1] for name in layers]
    rest, _, part = where.rpartition(".")
    if not part or part not in parts:
        rest, part = where, ""
    chosen = set(_flat(rest or ("all" if part else ""), selector, layers))
    positions = [
        position
        for position, index in enumerate(flat_indices(layers))
        if index in chosen and part in ("", parts[position])
    ]
    if not positions:
        raise ValueError(
            f"layer selector {shown(selector)}: no layer of {shown(rest)} has a part {shown(part)}"
        )
    return positions


def _flat(where: str, selector: str, layers: Sequence[str]) -> list[int]:
    """Flat indices of the layers that an entry names, its part left out."""
    by_group = {"": sorted(set(flat_indices(layers))), **groups(layers)}
    if where == "all":
        return by_group[""]
    if where in by_group and where:
        return by_group[where]
    group, _, numbers = where.partition(".") if "." in where else ("", "", where)
    if group not in by_group or not _RANGE.fullmatch(numbers):
        raise ValueError(
            f"layer selector {shown(selector)}: {shown(where)} matches no layer; the layers here are "
            f"{describe(layers)}"
        )
    members = by_group[group]
    what = f"layer selector {shown(selector)}: {group + ' ' if group else ''}layer"
    return [members[i] for i in _indices(numbers, len(members), what)]


def _indices(text: str, count: int, what: str) -> range:
    """The indices that a range names among `count` things."""
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ValueError(f"{what}: expected a number or a range such as 0-3, got {shown(text)}")
    ends = [int(n) for n in match.groups() if n is not None]
    first, last = (n + count if n < 0 else n for n in (ends[0], ends[-1]))
    if not 0 <= first <= last < count:
        raise ValueError(f"{what} {text} is out of range: there are {count}, numbered 0-{count - 1}")
    return range(first, last + 1)
