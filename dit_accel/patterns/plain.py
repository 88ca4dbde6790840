"""Patterns as plain data, as files have them: a mapping with the name and what is not at its default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.arguments import shown

from .base import Pattern


def to_plain(pattern: Pattern, files: bool = True) -> dict[str, Any]:
    """`{"pattern": "Clear", "radius": 16}`; see `from_plain`. Without `files`, their contents' digests."""
    values = {f.name: getattr(pattern, f.name) for f in dataclasses.fields(pattern)}
    defaults = {f.name: f.default for f in dataclasses.fields(pattern)}
    return {
        "pattern": type(pattern).__name__,
        **{k: _plain(v, files) for k, v in values.items() if v != defaults[k]},
    }


def _plain(value: Any, files: bool) -> Any:
    """Of a field: tuples as lists, all the way down, patterns within it, and what has a file as its path."""
    if isinstance(value, Pattern):
        return to_plain(value, files)
    if hasattr(value, "digest"):
        return value.file() if files else value.digest
    if isinstance(value, float):  # as plain as it can be
        return float(value)
    return [_plain(v, files) for v in value] if isinstance(value, (tuple, list)) else value


def from_plain(data: Any, kinds: Mapping[str, type[Pattern]], folder: str | Path = ".") -> Pattern:
    """The pattern that plain data says, by name if it has no arguments.

    Args:
        data: a name or a mapping.
        kinds: the patterns that there are, by name.
        folder: what files are relative to that it names.

    Raises:
        ValueError: no such pattern, an argument that it does not have, or a value that it refuses.
    """
    if isinstance(data, str):
        data = {"pattern": data}
    if not isinstance(data, dict) or not isinstance(data.get("pattern"), str):
        raise ValueError(f"a pattern must be a mapping with the key `pattern`, got {shown(data)}")
    name, cls = data["pattern"], kinds.get(data["pattern"])
    if cls is None:
        raise ValueError(f"unknown pattern {shown(name)}; the patterns are {', '.join(kinds)}")
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = [key for key in data if key not in ("pattern", *known)]
    if unknown:
        raise ValueError(
            f"pattern {name}: unknown key {shown(unknown[0])}; the keys are {', '.join(known) or 'none'}"
        )
    values = {key: _value(value, kinds, folder) for key, value in data.items() if key != "pattern"}
    for key in cls.file_fields:
        if isinstance(values.get(key), str):
            values[key] = str(Path(folder) / values[key])
    try:
        return cls(**values)
    except FileNotFoundError as error:
        raise ValueError(f"pattern {name}: {error}") from None
    except TypeError as error:
        raise ValueError(f"pattern {name}: {error}") from None


def _value(data: Any, kinds: Mapping[str, type[Pattern]], folder: str | Path) -> Any:
    """Of a pattern's field: lists as tuples, all the way down, and patterns within patterns."""
    if isinstance(data, dict) and "pattern" in data:
        return from_plain(data, kinds, folder)
    return tuple(_value(v, kinds, folder) for v in data) if isinstance(data, list) else data
