"""The budget is kept, and what is chosen is as good as the best of all combinations, but for one step."""

import itertools
import random

import pytest

from dit_accel.calibration.knapsack import fill, lower_hull


def drawn(seed, items=4, options=5):
    draw = random.Random(seed)
    costs = [[draw.uniform(0.05, 1) for _ in range(options)] for _ in range(items)]
    errors = [[draw.uniform(0, 1) for _ in range(options)] for _ in range(items)]
    return costs, errors, [draw.choice([0.5, 1, 2]) for _ in range(items)]


def total(table, weights, chosen):
    return sum(w * row[n] for w, row, n in zip(weights, table, chosen, strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_nearly_the_best_of_all_combinations(seed):
    costs, errors, weights = drawn(seed)
    budget = 0.4
    chosen = fill(costs, errors, weights, budget)
    cheapest = [min(range(5), key=lambda n, row=row: (row[n], n)) for row in costs]
    limit = max(budget * sum(weights), total(costs, weights, cheapest))
    assert total(costs, weights, chosen) <= limit + 1e-9
    within = [c for c in itertools.product(range(5), repeat=4) if total(costs, weights, c) <= limit + 1e-9]
    best = min(total(errors, weights, c) for c in within)
    hulls = [lower_hull(list(zip(c, e, range(5), strict=True))) for c, e in zip(costs, errors, strict=True)]
    steps = [
        w * (a[1] - b[1]) for w, hull in zip(weights, hulls, strict=True) for a, b in itertools.pairwise(hull)
    ]
    assert total(errors, weights, chosen) <= best + max(steps, default=0)


def test_the_pair_that_saves_most_is_bought_first():
    costs, errors = [[0.1, 0.3], [0.1, 0.3]], [[1.0, 0.9], [1.0, 0.2]]
    assert fill(costs, errors, [1, 1], 0.2) == [0, 1]
    assert fill(costs, errors, [1, 1], 0.3) == [1, 1]
    assert fill(costs, errors, [1, 1], 0.01) == [0, 0]  # the cheapest there is


def test_hull_is_convex_and_falls():
    for seed in range(50):
        costs, errors, _ = drawn(seed, 1, 12)
        hull = lower_hull(list(zip(costs[0], errors[0], range(12), strict=True)))
        slopes = [(a[1] - b[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(hull)]
        assert slopes == sorted(slopes, reverse=True)
        assert all(slope > 0 for slope in slopes)
        assert hull[0][0] == min(costs[0])
        for cost, error in zip(costs[0], errors[0], strict=True):  # nothing is below it
            for a, b in itertools.pairwise(hull):
                if a[0] <= cost <= b[0]:
                    assert error >= a[1] + (b[1] - a[1]) * (cost - a[0]) / (b[0] - a[0]) - 1e-12
    assert lower_hull([(0.5, 1.0, 0), (0.5, 0.4, 1), (0.2, 0.4, 2)]) == [(0.2, 0.4, 2)]
