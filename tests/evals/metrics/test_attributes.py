"""Attribute accuracy through the library: bundled models only, dense and accelerated."""

import pytest

from dit_accel.evals.metrics import attributes
from dit_accel.patterns import Neighborhood
from dit_accel.pipelines import load
from dit_accel.recipe.recipe import Recipe


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="bundled models only: tiny-flux"):
        attributes.check_bundled("black-forest-labs/FLUX.1-dev")


@pytest.mark.slow
def test_recipe_is_on_only_while_it_is_evaluated():
    pipe = load("tiny-flux")
    options = {"n": 2, "steps": 2, "batch": 2, "progress": False}
    dense = attributes.evaluate(pipe, **options)
    sparse = attributes.evaluate(pipe, Recipe(Neighborhood((3, 3))), **options)
    assert dense["run_density"] == 1
    assert 0 < sparse["run_density"] < 1
    assert attributes.evaluate(pipe, **options) == dense
