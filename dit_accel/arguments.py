"""Numbers and switches that are checked where they enter: integers, positive numbers, one for each axis.

NumPy's numbers are taken and made plain, so that what holds them compares, hashes and is written to files
alike; `True` and `False` are not numbers. Errors are ValueErrors that name the argument and the value seen.
"""

from __future__ import annotations

import math
import reprlib
from numbers import Integral, Real
from typing import Any, TypeGuard


class _Shown(reprlib.Repr):
    """Representations short enough for a message, of anything and in no time."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlong, self.maxstring, self.maxother = 3, 4, 40, 80, 120

    def repr_int(self, value: int, level: int) -> str:
        if abs(value) < 10**self.maxlong:
            return repr(value)
        return f"an integer of {value.bit_length()} bits"  # Python refuses to write out long ones


def shown(value: Any) -> str:
    """`value` as a message quotes it, shortened."""
    return _SHOWN.repr(value)


_SHOWN = _Shown()


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether it is an integer, of Python or NumPy, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold, neither infinite nor NaN."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # of an integer
        return False


def integer(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int, from `least` up."""
    if not is_integer(value) or (least is not None and value < least):
        kind = "a positive integer" if least == 1 else "an integer"
        bound = "" if least in (None, 1) else f" of at least {least}"
        raise ValueError(f"`{name}` must be {kind}{bound}, got {shown(value)}")
    return int(value)


def integers(name: str, value: Any, axes: str, least: int | None = None) -> tuple[int, ...]:
    """`value` as a tuple of ints, one for each of `axes`, such as `"(rows, columns)"`, from `least` up."""
    count = axes.count(",") + 1
    values = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(values) != count or any(not is_integer(n) or (least is not None and n < least) for n in values):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"`{name}` must be {count} integers {axes}{bound}, got {shown(value)}")
    return tuple(map(int, values))


def positive(name: str, value: Any) -> int | float:
    """`value` as an int or a float above 0."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"`{name}` must be a positive number, got {shown(value)}")
    return int(value) if is_integer(value) else float(value)


def noise_level(name: str, value: Any) -> float:
    """`value` as a noise level of a flow, a float from 0 to 1."""
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be a noise level from 0 to 1, got {shown(value)}")
    return float(value)


def switch(name: str, value: Any) -> bool:
    """`value` if it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {shown(value)}")
    return value


def per_axis(name: str, value: Any, axes: int, kind: type[int] | type[bool] = int) -> tuple[Any, ...]:
    """`value` once for each of `axes` axes: a scalar is repeated, a sequence must have that many entries."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    right = is_integer if kind is int else lambda v: isinstance(v, kind)
    if len(values) != axes or not all(map(right, values)):
        raise ValueError(
            f"`{name}` must be one value or {axes} of them (one per windowed axis), got {shown(value)}"
        )
    return tuple(map(kind, values))
