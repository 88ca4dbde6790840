"""Recipes know which layers and which steps of a run are dense, from every form that says so."""

import pytest

from dit_accel.patterns import Dense
from dit_accel.recipe.recipe import Recipe


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (0, []),
        (2, [0, 1]),
        ({0, -1}, [0, 5]),
        ([3, 3, -6], [0, 3]),
        (range(4), [0, 1, 2, 3]),
        (6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_dense_layers(spec, expected):
    assert sorted(Recipe(Dense(), dense_layers=spec).dense_layer_indices(6)) == expected


@pytest.mark.parametrize("spec", [7, {6}, {-7}])
def test_dense_layers_out_of_range(spec):
    with pytest.raises(ValueError, match="6 attention layers"):
        Recipe(Dense(), dense_layers=spec).dense_layer_indices(6)


@pytest.mark.parametrize(
    ("spec", "total", "expected"),
    [
        (0, 5, []),
        (2, 5, [0, 1]),
        (9, 5, [0, 1, 2, 3, 4]),
        ({0, -1}, 5, [0, 4]),
        ({-2, -1}, 5, [3, 4]),
        ({7}, 5, []),
        (0.0, 5, []),
        (0.24, 50, list(range(12))),
        (0.1, 5, [0]),
        (0.6, 5, [0, 1, 2]),
        (1.0, 5, [0, 1, 2, 3, 4]),
    ],
)
def test_dense_steps(spec, total, expected):
    recipe = Recipe(Dense(), dense_steps=spec)
    assert [step for step in range(total) if recipe.is_dense_step(step, total)] == expected


def test_dense_steps_without_a_total():
    assert Recipe(Dense(), dense_steps={0, 2}).is_dense_step(2, None)
    assert not Recipe(Dense(), dense_steps=1).is_dense_step(1, None)
    for spec in (0.5, {-1}):
        with pytest.raises(ValueError, match=r"handle\.begin\(steps\)"):
            Recipe(Dense(), dense_steps=spec).is_dense_step(0, None)
