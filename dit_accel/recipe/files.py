"""Text and files of recipes: YAML and JSON to plain data, which is bounded before anything is made of it.

Plain data is text, booleans, None, whole numbers of 64 bits, finite numbers, and lists and mappings of these.
A file that was made to do harm gets no further than an error, and takes no time or memory to speak of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.arguments import is_integer, is_number, shown
from dit_accel.files import read_text
from dit_accel.json_files import from_json

SUFFIXES = (".yaml", ".yml", ".json")
LONGEST = 400_000  # characters: a strength for every head of the largest models takes half of it
DEEPEST = 12  # lists and mappings within each other
MOST = 20_000  # values: those strengths are 12,000


def read(path: Path) -> Any:
    """The plain data in a file, JSON if it ends in .json, else YAML.

    Raises:
        ValueError: naming the file, which is missing, too large, not text, or not plain data.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.stat().st_size > 4 * LONGEST:  # bytes of a character
        raise ValueError(f"{path} is too large for a recipe: {path.stat().st_size} bytes")
    text = read_text(path)
    try:
        return parse(text, only_json=path.suffix == ".json")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def parse(text: str, only_json: bool = False) -> Any:
    """The plain data that a text says; YAML has JSON in it.

    Raises:
        ValueError: text that is neither, YAML with aliases, tags or merges, or a key that is there twice.
        ValueError, TypeError: see `plain_data`.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a recipe must have at most {LONGEST} characters, got {len(text)}")
    if only_json:
        return plain_data(from_json(text))
    try:
        data = from_json(text)
    except ValueError:
        from .yaml_text import from_yaml  # the library works without PyYAML until it meets YAML

        data = from_yaml(text, DEEPEST, MOST)
    return plain_data(data)


def plain_data(data: Any) -> Any:
    """A copy of plain data: sequences as lists, keys as text, NumPy's numbers as Python's.

    Raises:
        ValueError: more than `MOST` values, nested more than `DEEPEST` deep, or a number that is infinite,
            NaN or beyond 64 bits.
        TypeError: something that is not plain, or a key that is neither text nor a whole number.
    """
    left = MOST

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"a recipe must hold at most {MOST} values")
        if isinstance(value, str | bool) or value is None:
            return value
        if is_integer(value):
            if not -(2**63) <= value < 2**64:
                raise ValueError("a recipe holds a whole number of more than 64 bits")
            return int(value)
        if is_number(value):
            return float(value)
        if isinstance(value, float):
            raise ValueError(f"numbers of a recipe must be finite, got {value}")
        if depth >= DEEPEST and isinstance(value, Mapping | list | tuple | set | frozenset):
            raise ValueError(f"a recipe must not be nested more than {DEEPEST} deep")
        if isinstance(value, Mapping):
            return {_key(key): copy(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item, depth + 1) for item in value]
        raise TypeError(
            f"a recipe holds text, numbers, lists and mappings, got {shown(value)} ({type(value).__name__})"
        )

    return copy(data, 0)


def _key(key: Any) -> str:
    if isinstance(key, str) or is_integer(key):
        return str(key)
    raise TypeError(f"keys of a recipe must be text, got {shown(key)}")
