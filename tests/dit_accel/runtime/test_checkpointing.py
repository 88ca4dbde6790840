"""Gradient checkpointing: blocks that run again in the backward pass are in the call that they were in."""

from __future__ import annotations

import functools

import pytest
import torch
from left_behind import state_of
from torch.utils.checkpoint import checkpoint

from dit_accel.patterns import Clear, Dense, Neighborhood, SparseVideoGen
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, disable, enable

FAMILIES = pytest.mark.parametrize("family", ["flux", "sd3", "wan", "hunyuan"])
FUNCTIONS = {
    "diffusers' own": None,
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "preserving nothing": functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False),
}


@pytest.fixture
def case(family, request):
    return request.getfixturevalue(family)


def recipe_of(case, **options):
    image = hasattr(case.pipe.transformer.config, "joint_attention_dim")
    pattern = Clear(3) if image else Neighborhood((3, 3, 3))
    return Recipe(pattern, **{"order": "hilbert", "block_size": (16, 16), **options})


def with_gradients(inputs):
    """Inputs from which gradients flow back, without which reentrant checkpoints give none to weights."""
    flows = ("hidden_states", "encoder_hidden_states")
    return {n: x.detach().clone().requires_grad_() if n in flows else x for n, x in inputs.items()}


def loss(transformer, inputs, timestep=None):
    if timestep is not None:
        inputs = {**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}
    return transformer(**inputs)[0].square().mean()


def gradients(transformer):
    """Of all weights, then none."""
    found = {n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None}
    transformer.zero_grad(set_to_none=True)
    return found


def same(actual, expected):
    assert actual.keys() == expected.keys()
    assert len(actual) > 20
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():  # some are zero but for rounding, as keys have a bias
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6 * largest)


@FAMILIES
@pytest.mark.parametrize("function", FUNCTIONS)
class TestGradients:
    def test_of_one_call(self, case, function):
        transformer, inputs = case.pipe.transformer, with_gradients(case.inputs(case.pipe))
        loss(transformer, inputs).backward()
        untouched = gradients(transformer)
        with accelerated(transformer, recipe_of(case)):
            loss(transformer, inputs).backward()
            expected = gradients(transformer)
            transformer.enable_gradient_checkpointing(FUNCTIONS[function])
            loss(transformer, inputs).backward()
            same(gradients(transformer), expected)
        loss(transformer, inputs).backward()
        same(gradients(transformer), untouched)

    def test_two_forwards_before_two_backwards(self, case, function):
        """Of a dense and a sparse step, in both orders, with other calls between."""
        transformer, inputs = case.pipe.transformer, with_gradients(case.inputs(case.pipe))
        handle, expected = enable(transformer, recipe_of(case, dense_steps=1)), []
        for timestep in (900.0, 400.0):  # the first step is dense
            loss(transformer, inputs, timestep).backward()
            expected.append(gradients(transformer))
        assert (handle.step, handle.stats()["dense_steps"]) == (1, [0])
        transformer.enable_gradient_checkpointing(FUNCTIONS[function])
        for first in (0, 1):
            handle.begin(3)
            losses = [loss(transformer, inputs, timestep) for timestep in (900.0, 400.0)]
            with torch.no_grad():
                loss(transformer, inputs, 300.0)
            for i in (first, 1 - first):
                losses[i].backward()
                same(gradients(transformer), expected[i])

    def test_an_optimizer_step_a_step(self, case, function):
        """Training at dense and sparse steps in turn ends with the same weights as without."""

        def trained(checkpointing):
            transformer = case.make().transformer
            if checkpointing:
                transformer.enable_gradient_checkpointing(FUNCTIONS[function])
            handle = enable(transformer, recipe_of(case, dense_steps={1}))
            handle.begin(3)
            optimizer = torch.optim.SGD(transformer.parameters(), lr=1e-2)
            for timestep in (900.0, 500.0, 100.0):
                loss(transformer, inputs, timestep).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert handle.stats()["dense_steps"] == [1]
            return {name: weight.detach() for name, weight in transformer.named_parameters()}

        inputs = with_gradients(case.inputs(case.pipe))
        same(trained(True), trained(False))


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_patterns_that_choose_by_content(case):
    transformer, inputs = case.pipe.transformer, with_gradients(case.inputs(case.pipe))
    enable(transformer, SparseVideoGen(keep=0.5, block_size=16))
    loss(transformer, inputs).backward()
    expected = gradients(transformer)
    transformer.enable_gradient_checkpointing()
    loss(transformer, inputs).backward()
    same(gradients(transformer), expected)


@FAMILIES
class TestState:
    def test_nothing_stays(self, case):
        transformer, inputs = case.pipe.transformer, with_gradients(case.inputs(case.pipe))
        function = FUNCTIONS["preserving nothing"]
        transformer.enable_gradient_checkpointing(function)
        before = state_of(transformer)
        enable(transformer, recipe_of(case))
        loss(transformer, inputs).backward()
        enable(transformer, Dense())
        loss(transformer, inputs).backward()
        disable(transformer)
        assert transformer._gradient_checkpointing_func is function
        assert state_of(transformer) == before

    def test_switched_on_and_off_while_enabled(self, case):
        transformer, inputs = case.pipe.transformer, with_gradients(case.inputs(case.pipe))
        enable(transformer, recipe_of(case))
        loss(transformer, inputs).backward()
        expected = gradients(transformer)
        runs, layer = [], next(iter(family_of(transformer).layers(transformer).values()))
        with layer.register_forward_hook(lambda *_: runs.append(None)):
            for switch, count in (("enable", 2), ("disable", 1), ("enable", 2)):
                getattr(transformer, f"{switch}_gradient_checkpointing")()
                runs.clear()
                loss(transformer, inputs).backward()
                same(gradients(transformer), expected)
                assert len(runs) == count

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_a_backward_after_disable_is_refused(self, case, function):
        """Its blocks would run without the recipe of the forward."""
        transformer, inputs = case.pipe.transformer, with_gradients(case.inputs(case.pipe))
        transformer.enable_gradient_checkpointing(FUNCTIONS[function])
        enable(transformer, recipe_of(case))
        out = loss(transformer, inputs)
        disable(transformer)
        with pytest.raises(RuntimeError, match=r"backward .* before `dit_accel.disable`"):
            out.backward()
