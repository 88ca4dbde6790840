"""Errors of sparse attention at calls of a dense run."""

from dataclasses import replace

import pytest
import torch

from dit_accel.evals.benchmarks.dense_calls import Compared, Recorded, attention_error, call_errors, called
from dit_accel.patterns import Dense, Neighborhood, Routed
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated

NEAR = Recipe(Neighborhood((3, 3, 3)), block_size=(16, 16), order="raster")
TOP = Recipe(Routed(top_k=0.3, block_size=(16, 16)))


def calls_of(case) -> list[Recorded]:
    inputs = case.inputs(case.pipe)
    return [Recorded(0, 999.0, inputs, called(case.pipe.transformer, inputs))]


def test_errors_of_calls_are_against_the_dense_call(wan):
    transformer, calls = wan.pipe.transformer, calls_of(wan)
    dense, _ = call_errors(transformer, Recipe(Dense()), calls)
    without, density = call_errors(transformer, NEAR, calls)
    tailed, more = call_errors(transformer, replace(NEAR, tail="pooled"), calls)
    assert dense == [0.0]
    assert without[0] > tailed[0] > 0
    assert more > density


@pytest.mark.parametrize("recipe", [NEAR, TOP], ids=["static", "online"])
def test_layers_are_compared_on_what_the_dense_run_gives_them(wan, recipe):
    """Layer by layer alone, whose inputs are the dense run's as only later layers differ."""
    transformer, calls = wan.pipe.transformer, calls_of(wan)
    outputs: dict[str, torch.Tensor] = {}
    layers = family_of(transformer).layers(transformer)
    for name, layer in layers.items():  # what its heads give, before the projection
        layer.to_out[0].register_forward_pre_hook(lambda _, args, name=name: outputs.update({name: args[0]}))
    called(transformer, calls[0].inputs)
    dense, errors = dict(outputs), []
    for index, name in enumerate(layers):
        with accelerated(transformer, replace(recipe, attention={str(index): recipe.attention})):
            called(transformer, calls[0].inputs)
        errors.append(float((outputs[name] - dense[name]).norm() / dense[name].norm()))
    assert attention_error(transformer, recipe, calls) == pytest.approx(sum(errors) / 3, rel=1e-3)
    assert min(errors) > 0.01


def test_what_compares_changes_nothing(wan):
    with accelerated(wan.pipe.transformer, replace(NEAR, attention=Compared(NEAR.attention))):
        inputs = wan.inputs(wan.pipe)
        out = called(wan.pipe.transformer, inputs)
    torch.testing.assert_close(out, called(wan.pipe.transformer, inputs), rtol=1e-4, atol=1e-5)
