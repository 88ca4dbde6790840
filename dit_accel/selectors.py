"""Layer selectors: which attention layers, and which heads of them, an entry of a recipe means.

The grammar, with layers named by the family (FLUX: `double.0` ..., `single.0` ...; Wan: `blocks.0` ...):

    selector := entry ("," entry)*
    entry    := layers | layers "/" heads | heads
    layers   := "all" | group | group "." range | range      a bare range counts through all layers
    heads    := "heads." range
    range    := n | first "-" last                           inclusive; a negative number counts from the end

Examples: `"all"`, `"double"`, `"double.0-18"`, `"single.3"`, `"blocks.-1"`, `"0-56"`, `"0-3,-1"`,
`"heads.0-3"`, `"single/heads.0-3,single/heads.7"`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?")


def select(selector: str, layers: Sequence[str], heads: int) -> list[tuple[int, tuple[int, ...]]]:
    """The (flat layer index, head indices) pairs that a selector names.

    Args:
        selector: text of the grammar above.
        layers: names of all layers in flat order, such as `["double.0", ..., "single.37"]`.
        heads: number of heads of every layer.

    Raises:
        ValueError: text outside the grammar, or an entry that matches nothing.
    """
    if not isinstance(selector, str):
        raise ValueError(f"a layer selector must be text, got {selector!r}")
    chosen = []
    for entry in selector.split(","):
        where, _, which = entry.strip().partition("/")
        if where.startswith("heads.") and not which:
            where, which = "all", where
        if which and not which.startswith("heads."):
            raise ValueError(
                f"layer selector {selector!r}: expected `heads.` and a range after `/`, got {which!r}"
            )
        head_range = which.removeprefix("heads.") if which else f"0-{heads - 1}"
        head_indices = tuple(_indices(head_range, heads, f"layer selector {selector!r}: head"))
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


def groups(layers: Sequence[str]) -> dict[str, list[int]]:
    """Flat indices of the layers of each group, in order: `{"double": [0, ...], "single": [19, ...]}`."""
    found: dict[str, list[int]] = {}
    for index, name in enumerate(layers):
        found.setdefault(name.partition(".")[0], []).append(index)
    return found


def describe(layers: Sequence[str]) -> str:
    """The layers in the grammar's own words: `"double.0-18, single.0-37"`."""
    return ", ".join(f"{group}.0-{len(members) - 1}" for group, members in groups(layers).items())


def _layers(where: str, selector: str, layers: Sequence[str]) -> list[int]:
    by_group = {"": list(range(len(layers))), **groups(layers)}
    if where == "all":
        return by_group[""]
    if where in by_group and where:
        return by_group[where]
    group, _, numbers = where.partition(".") if "." in where else ("", "", where)
    if group not in by_group or not _RANGE.fullmatch(numbers):
        raise ValueError(
            f"layer selector {selector!r}: {where!r} matches no layer; the layers here are {describe(layers)}"
        )
    members = by_group[group]
    what = f"layer selector {selector!r}: {group + ' ' if group else ''}layer"
    return [members[i] for i in _indices(numbers, len(members), what)]


def _indices(text: str, count: int, what: str) -> range:
    """The indices that a range names among `count` things."""
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ValueError(f"{what}: expected a number or a range such as 0-3, got {text!r}")
    ends = [int(n) for n in match.groups() if n is not None]
    first, last = (n + count if n < 0 else n for n in (ends[0], ends[-1]))
    if not 0 <= first <= last < count:
        raise ValueError(f"{what} {text} is out of range: there are {count}, numbered 0-{count - 1}")
    return range(first, last + 1)
