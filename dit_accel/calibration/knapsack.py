"""A budget of computed pairs, spent where each pair saves the most error."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Choice = tuple[float, float, int]  # cost, error, which


def fill(
    costs: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float]],
    weights: Sequence[float],
    budget: float,
) -> list[int]:
    """Which option each item takes, so that the weighted error is small at a weighted mean cost of `budget`.

    All begin with their cheapest option. Then, one after another, the step to a dearer option is taken that
    saves the most error for its cost, of those on the lower convex hull of an item's options, until none fits
    into what is left. This is the optimum of the relaxed problem, in which one item may take a part of a
    step, and at most that one step worse.

    Args:
        costs, errors: of each option of each item.
        weights: how much an item counts, in the cost and in the error.
        budget: of the mean cost. Where the cheapest options exceed it, they are what is taken.

    Returns:
        indices of options, one for each item.
    """
    items = zip(costs, errors, strict=True)
    hulls = [lower_hull(list(zip(c, e, range(len(c)), strict=True))) for c, e in items]
    at = [0] * len(hulls)
    left = budget * sum(weights) - sum(w * hull[0][0] for w, hull in zip(weights, hulls, strict=True))
    steps = [(-slope(hull, 0), item) for item, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, item = heapq.heappop(steps)
        hull, now = hulls[item], at[item]
        cost = weights[item] * (hull[now + 1][0] - hull[now][0])
        if cost > left * (1 + 1e-12):
            continue  # nor do this item's further steps come before this one
        left -= cost
        at[item] = now + 1
        if now + 2 < len(hull):
            heapq.heappush(steps, (-slope(hull, now + 1), item))
    return [hull[n][2] for hull, n in zip(hulls, at, strict=True)]


def slope(hull: Sequence[Choice], at: int) -> float:
    """Error saved for each unit of cost by the step after option `at`."""
    (cost, error, _), (dearer, less, _) = hull[at], hull[at + 1]
    return (error - less) / (dearer - cost)


def lower_hull(options: Sequence[Choice]) -> list[Choice]:
    """The options on the lower convex hull, by rising cost and falling error, from the cheapest on."""
    hull: list[Choice] = []
    for cost, error, which in sorted(options):
        if hull and error >= hull[-1][1]:
            continue  # so of equal costs only the first, which has the least error
        while len(hull) > 1 and slope(hull, len(hull) - 2) * (cost - hull[-1][0]) <= hull[-1][1] - error:
            hull.pop()
        hull.append((cost, error, which))
    return hull
