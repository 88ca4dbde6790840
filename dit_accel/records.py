"""JSON files: results for programs, and records of what made the files beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """`value` in JSON's terms: what is not finite becomes null, paths become text, sets become lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return str(value)


def to_json(value: Any) -> str:
    return json.dumps(plain(value), indent=2, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` atomically."""
    from .evals.media import atomic

    with atomic(path) as temporary:
        temporary.write_text(to_json(value) + "\n")


def check_same(earlier: Mapping[str, Any], now: Mapping[str, Any], what: str, elsewhere: str) -> None:
    """Refuses to go on with work that was begun with other settings.

    Args:
        earlier: the settings it was begun with, as read from JSON.
        now: those of this run; each must be the same in `earlier`, once in JSON's terms.
        what: the work, as in "the videos in DIR were made".
        elsewhere: where this run may go instead, as in "another --out".

    Raises:
        ValueError: naming the first setting that differs.
    """
    for key, value in plain(now).items():
        if earlier.get(key) != value:
            raise ValueError(
                f"{what} with another `{key}`, {earlier.get(key)!r:.200}, not {value!r:.200}; use the same "
                f"settings, or {elsewhere}"
            )
