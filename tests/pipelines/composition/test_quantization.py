"""Quantized attention in each family: the specification's output, with guidance and several samples."""

from dataclasses import replace

import pytest
import torch

from dit_accel.errors import UnavailableError
from dit_accel.patterns import Dense
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable


@pytest.mark.feature('Quantized attention (`quantization="int8"`) on top of a pattern')
def test_on_top_of_a_pattern(case):
    check(case, replace(case.recipe, block_size=(32, 32)), rough=0.05)


@pytest.mark.feature('Quantized attention (`quantization="int8"`) alone, over `Dense()`')
def test_alone(case):
    check(case, Recipe(Dense(), block_size=(32, 32)), rough=0.05)


@pytest.mark.feature('Quantized attention (`quantization="int8-int4"`) with the pooled tail')
def test_four_bits_with_a_tail(case, cell):
    """One of few values that rounds the other way is moved by a whole level, which steps and CFG enlarge."""
    recipe = replace(case.recipe, block_size=(32, 32), tail="pooled")
    if case.family == "far":
        with cell.refused(UnavailableError, "use tail=None", "it would show chunks to come"):
            enable(case.make(), replace(recipe, quantization="int8-int4"))
        return
    check(case, recipe, "int8-int4", rough=0.3, other=0.3)


def check(case, plain: Recipe, format: str = "int8", *, rough: float, other: float = 0.1) -> None:
    """It is what the specification computes, near what it is without, and gone when it is disabled.

    Args:
        rough: the greatest error of quantization, of the output.
        other: what values that round the other way may differ by, of that error.
    """
    run, recipe = {"batch": 2, "cfg": 3.0, "steps": 2}, replace(plain, quantization=format)
    untouched = case.run(case.make(), **run)
    pipe = case.make()
    with accelerated(pipe, replace(recipe, backend="reference")):
        expected = case.run(pipe, **run)
    with accelerated(pipe, plain):
        exact = case.run(pipe, **run)
    with accelerated(pipe, recipe):
        actual = case.run(pipe, **run)
    assert torch.equal(case.run(pipe, **run), untouched)
    difference = (expected - exact).norm()
    assert 0 < difference < rough * exact.norm()
    assert (actual - expected).norm() < other * difference + 1e-5 * exact.norm()
