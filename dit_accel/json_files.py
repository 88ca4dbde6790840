"""JSON files, strict: results for programs, and records of what made the files beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .files import read_text, write_text


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
    """A value as strict, indented JSON text; NaN and infinity raise ValueError."""
    return json.dumps(plain(value), indent=2, allow_nan=False)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` atomically."""
    write_text(path, to_json(value) + "\n")


def from_json(text: str) -> Any:
    """What JSON text says: no key twice in an object, no NaN or Infinity, nothing nested without end.

    Raises:
        ValueError: text that is no such JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | Path, what: str = "JSON") -> Any:
    """The content of a JSON file, see `from_json`, in UTF-8 with or without a byte order mark.

    Args:
        path: the file.
        what: what it should be, as in "PATH cannot be read as a result of `dit-accel eval`".

    Raises:
        ValueError: naming the file: it is missing, not text, or not JSON.
    """
    text = read_text(path)
    try:
        return from_json(text)
    except ValueError as error:
        reason = "it is empty" if not text.strip() else str(error)
        raise ValueError(f"{path} cannot be read as {what}: {reason}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.80} is there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


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
