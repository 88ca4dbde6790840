"""Which layers and steps are dense: the first n, a set of indices, a share of the run, a range of noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from dit_accel.arguments import is_integer, is_number, shown

from .noise import NoiseRange

Layers = int | tuple[int, ...]
Steps = int | float | tuple[int, ...] | NoiseRange
_MOST_INDICES = 100_000  # of a set; no model has as many layers, no run as many steps


def checked_layers(value: Any) -> Layers:
    """A validated `dense_layers`.

    Raises:
        ValueError, TypeError: neither an int from 0 nor a set of indices.
    """
    return _checked("dense_layers", value)


def checked_steps(value: Any) -> Steps:
    """A validated `dense_steps`.

    Raises:
        ValueError, TypeError: none of an int from 0, a float from 0 to 1, a set of indices and a noise range.
    """
    if isinstance(value, NoiseRange):
        return value
    if isinstance(value, Mapping):
        return NoiseRange.of("dense_steps", value)
    return _checked("dense_steps", value, fraction=True)


def layer_indices(dense: Layers, layers: int) -> frozenset[int]:
    """Flat indices of the dense layers of a model with `layers` layers.

    Raises:
        ValueError: an index that this model does not have.
    """
    if isinstance(dense, int):
        if dense > layers:
            raise ValueError(f"`dense_layers` is {dense}, but this model has {layers} attention layers")
        return frozenset(range(dense))
    missing = [i for i in dense if not -layers <= i < layers]
    if missing:
        raise ValueError(f"`dense_layers` names {missing}, but this model has {layers} attention layers")
    return frozenset(i % layers for i in dense)


def needs_total(dense: Steps) -> bool:
    """Whether the dense steps depend on how many steps a run has."""
    return isinstance(dense, float) or (isinstance(dense, tuple) and any(i < 0 for i in dense))


def is_dense_step(dense: Steps, step: int, total: int | None, sigma: float | None) -> bool:
    """Whether sampler step `step` of `total` (None: not known), at noise level `sigma`, is dense.

    Raises:
        ValueError: the answer depends on a total or on a noise level that is not known.
    """
    if isinstance(dense, NoiseRange):
        if sigma is None:
            raise ValueError(f"`dense_steps` of {dense} needs the noise level of the step")
        return sigma in dense
    if isinstance(dense, int):
        return step < dense
    if total is not None:
        if isinstance(dense, float):
            return step < math.ceil(dense * total - 1e-9)
        return step in dense or step - total in dense
    if isinstance(dense, float) or needs_total(dense):
        raise ValueError(
            f"`dense_steps={dense!r}` needs the number of steps, which a bare transformer "
            "does not know; call `handle.begin(steps)` before the run, or enable on the pipeline"
        )
    return step in dense


def _checked(name: str, value: Any, fraction: bool = False) -> Any:
    """A validated int, float (a fraction of the steps) or sorted tuple of ints."""
    forms = "an int (the first n)"
    if fraction:
        forms += (
            ", a float from 0 to 1 (the first fraction), {'sigma': (low, high)} (a range of noise levels)"
        )
    message = f"`{name}` must be {forms} or a set of indices, got {shown(value)}"
    if is_integer(value) and value >= 0:
        return int(value)
    if fraction and is_number(value) and not is_integer(value) and 0 <= value <= 1:
        return float(value)
    if is_integer(value):
        raise ValueError(f"{message}; for the last n use {{-1, ...}}")
    if isinstance(value, bool | float):
        raise ValueError(message)
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(message)
    indices = list(islice(value, _MOST_INDICES + 1))
    if len(indices) > _MOST_INDICES:
        raise ValueError(f"`{name}` has more than {_MOST_INDICES} indices")
    if not all(map(is_integer, indices)):
        raise TypeError(message)
    return tuple(sorted({int(index) for index in indices}))
