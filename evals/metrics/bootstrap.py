"""Intervals of means by resampling with replacement (Efron 1979), the same draws on every call."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BOOTSTRAP = {"resamples": 2000, "interval": (2.5, 97.5), "seed": 0}


def resamples(n: int, count: int) -> Iterator[np.ndarray]:
    """`count` times n indices, the same for every method: comparisons are paired."""
    generator = np.random.default_rng(BOOTSTRAP["seed"])
    return (generator.integers(0, n, n) for _ in range(count))


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% interval of resampled values."""
    low, high = np.percentile(values, BOOTSTRAP["interval"])
    return float(low), float(high)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean of per-sample values (n,)."""
    means = [values[picks].mean() for picks in resamples(len(values), BOOTSTRAP["resamples"])]
    return interval(np.array(means))
