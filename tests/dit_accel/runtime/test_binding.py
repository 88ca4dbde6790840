"""Calls of an enabled transformer that end by an exception of any kind leave nothing for the next one."""

import asyncio
import dataclasses
import threading

import pytest
import torch
from left_behind import state_of

from dit_accel.attention import transformer_call
from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import Clear, Neighborhood
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import disable, enable

FAMILIES = pytest.mark.parametrize("family", ["flux", "sd3", "wan", "hunyuan"])
OTHER = {"flux": (6, 10), "sd3": (6, 10), "wan": (4, 5, 7), "hunyuan": (4, 5, 7)}


@pytest.fixture
def case(family, request):
    return request.getfixturevalue(family)


def recipe_of(family, **options):
    pattern = Clear(3) if family in ("flux", "sd3") else Neighborhood((3, 3, 5))
    return Recipe(pattern, order="hilbert", **{"dense_steps": 1, **options})


def layers(transformer):
    return list(family_of(transformer).layers(transformer).values())


def placed(transformer):
    """The module that gives tokens their places."""
    return transformer.rope if hasattr(transformer, "rope") else transformer.pos_embed


# where a call is stopped, each by another exception that is no `Exception`, but for the last
PLACES = {
    "a block": (lambda t, hook: family_of(t).blocks(t)[-1][-1].register_forward_hook(hook), GeneratorExit),
    "a layer": (lambda t, hook: layers(t)[1].to_k.register_forward_hook(hook), KeyboardInterrupt),
    "places": (lambda t, hook: placed(t).register_forward_hook(hook, prepend=True), SystemExit),
    "a pre-hook": (lambda t, hook: t.register_forward_pre_hook(hook), asyncio.CancelledError),
    "a hook": (lambda t, hook: t.register_forward_hook(hook, prepend=True), KeyboardInterrupt),
    "an error": (lambda t, hook: layers(t)[2].to_v.register_forward_hook(hook), ZeroDivisionError),
}


def stopped(case, place, at=2, **run):
    """A run that is stopped in its call number `at`."""
    register, exception = PLACES[place]
    calls = []

    def hook(*_):
        calls.append(None)
        if len(calls) == at:
            raise exception

    with register(case.pipe.transformer, hook), pytest.raises(exception):
        case.run(case.pipe, **run)
    assert len(calls) == at


@FAMILIES
@pytest.mark.parametrize("place", PLACES)
def test_stopped_call(case, family, place):
    transformer = case.pipe.transformer
    before, untouched = state_of(transformer), case.run(case.pipe)
    handle = enable(case.pipe, recipe_of(family))
    expected, other = case.run(case.pipe), case.run(case.pipe, grid=OTHER[family])
    stopped(case, place)
    assert torch.equal(case.run(case.pipe), expected)
    assert handle.stats()["calls"] == 3
    stopped(case, place, at=1)  # a dense step
    assert torch.equal(case.run(case.pipe, grid=OTHER[family]), other)
    stopped(case, place)
    disable(case.pipe)
    assert transformer_call.current(handle.bindings["transformer"]) is None
    assert state_of(transformer) == before
    assert torch.equal(case.run(case.pipe), untouched)


@FAMILIES
def test_another_transformer_is_not_affected(case, family):
    """The call that was stopped is still the latest of this thread when another transformer is called."""
    other = case.make(seed=1)
    enable(case.pipe, recipe_of(family))
    enable(other, recipe_of(family, dense_steps=0))
    expected = case.run(other)
    stopped(case, "a layer")
    assert torch.equal(case.run(other), expected)


@FAMILIES
def test_stopped_in_training(case, family):
    """With checkpointed blocks, stopped in the forward and in the backward."""
    transformer, inputs = case.pipe.transformer, case.inputs(case.pipe)
    transformer.enable_gradient_checkpointing()
    before = state_of(transformer)

    def gradient():
        transformer.zero_grad()
        transformer(**inputs)[0].square().mean().backward()
        return layers(transformer)[0].to_q.weight.grad.clone()

    enable(transformer, recipe_of(family, dense_steps=0))
    expected = gradient()
    for at in (1, 2):  # a checkpointed layer runs a second time in the backward
        calls = []

        def hook(*_, calls=calls, at=at):
            calls.append(None)
            if len(calls) == at:
                raise KeyboardInterrupt

        with layers(transformer)[1].to_q.register_forward_hook(hook), pytest.raises(KeyboardInterrupt):
            gradient()
        assert torch.equal(gradient(), expected)
    disable(transformer)
    assert state_of(transformer) == before


@FAMILIES
class TestGuidance:
    def recipe(self, family):
        heads = HeadPerturbation(heads=[(1, 0), (2, 1)], scale=2.0)
        return dataclasses.replace(recipe_of(family), guidance=heads)

    def test_stopped_in_the_perturbed_forward(self, case, family):
        transformer = case.pipe.transformer
        before = state_of(transformer)
        enable(case.pipe, self.recipe(family))
        expected = case.run(case.pipe)
        calls = []

        def hook(*_):
            calls.append(None)
            if len(calls) == 4:  # the second of the second step
                raise KeyboardInterrupt

        with layers(transformer)[2].to_q.register_forward_hook(hook), pytest.raises(KeyboardInterrupt):
            case.run(case.pipe)
        assert torch.equal(case.run(case.pipe), expected)
        disable(case.pipe)
        assert state_of(transformer) == before

    def test_another_thread_goes_on(self, case, family):
        """A thread that was stopped in a call is not in it any more."""
        enable(case.pipe, self.recipe(family))
        expected, result = case.run(case.pipe), []
        stopped(case, "a layer", at=1)
        thread = threading.Thread(target=lambda: result.append(case.run(case.pipe)))
        thread.start()
        thread.join()
        assert torch.equal(result[0], expected)
