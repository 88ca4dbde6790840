"""Calibrations in each family: the specification's output, with guidance and several samples."""

from dataclasses import replace

import calibrations
import pytest
import torch

from dit_accel.errors import UnavailableError
from dit_accel.patterns import Calibrated
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable

CACHED = "its keys are of a cache"


@pytest.mark.feature("Calibrated heads, with tails and without")
def test_calibrated(case, cell):
    check(case, cell)


@pytest.mark.feature('Calibrated heads with quantized attention (`quantization="int8"`)')
def test_calibrated_and_quantized(case, cell):
    check(case, cell, "int8")


def check(case, cell, quantization: str | None = None) -> None:
    """It is what the specification computes, and gone when it is disabled."""
    run = {"batch": 2, "cfg": 3.0, "steps": 2}
    pipe = case.make()
    untouched = case.run(case.make(), **run)
    found = calibrations.drawn_for(pipe.transformer, case.grid, steps=2)
    assert found.tail.any()
    recipe = Recipe(Calibrated(found), block_size=(32, 32), quantization=quantization)
    if case.family == "far":
        with cell.refused(UnavailableError, "does not take this recipe: .*use `ChunkGrowth`", CACHED):
            enable(pipe, recipe)
        return
    with accelerated(pipe, replace(recipe, backend="reference")):
        expected = case.run(pipe, **run)
    with accelerated(pipe, recipe):
        actual = case.run(pipe, **run)
    if quantization is None:
        case.close(actual, expected)
    else:  # some codes round the other way
        assert (actual - expected).norm() < 0.01 * expected.norm()
    assert torch.equal(case.run(pipe, **run), untouched)
    assert not torch.allclose(actual, untouched, atol=1e-3)
