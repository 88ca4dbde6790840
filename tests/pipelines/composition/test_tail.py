"""The compensated tail in each family: the specification's output, with guidance and several samples."""

from dataclasses import replace

import pytest
import torch

from dit_accel.errors import UnavailableError
from dit_accel.runtime.switching import accelerated, enable


@pytest.mark.feature('Pooled tail (`tail="pooled"`)')
def test_tail(case, cell):
    run, plain = {"batch": 2, "cfg": 3.0, "steps": 2}, case.recipe
    recipe = replace(plain, tail="pooled", block_size=(16, 16))
    if case.family == "far":
        with cell.refused(UnavailableError, "use tail=None", "it would show chunks to come"):
            enable(case.make(), recipe)
        return
    untouched = case.run(case.make(), **run)
    pipe = case.make()
    with accelerated(pipe, replace(recipe, backend="reference")):
        expected = case.run(pipe, **run)
    with accelerated(pipe, recipe):
        case.close(case.run(pipe, **run), expected)
    with accelerated(pipe, replace(recipe, tail=None)):
        without = case.run(pipe, **run)
    assert torch.equal(case.run(pipe, **run), untouched)
    assert 0 < (expected - untouched).norm() < (without - untouched).norm()
