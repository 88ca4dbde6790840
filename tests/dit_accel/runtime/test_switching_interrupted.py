"""Ctrl-C in the middle of `enable` and `disable`: what was on before is on, and nothing else."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from left_behind import state_of
from torch import nn

from dit_accel.guidance import HeadPerturbation
from dit_accel.guidance.branch import Branch
from dit_accel.patterns import Clear, Neighborhood
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime import binding as binding_module
from dit_accel.runtime import checkpointing, switching
from dit_accel.runtime.binding import Binding
from dit_accel.runtime.switching import accelerated, disable, enable, handle_of
from dit_accel.runtime.token_moves import TokenMoves

FAMILIES = pytest.mark.parametrize("family", ["flux", "sd3", "wan", "hunyuan"])
# what is called in `enable`, and its which call is stopped
PLACES = {
    "recipe": (switching, "resolve", 1),
    "binding": (switching, "_bind", 1),
    "layers": (binding_module, "assign_patterns", 1),
    "first processor": (binding_module, "accelerated", 1),
    "third processor": (binding_module, "accelerated", 3),
    "first hook": (nn.Module, "register_forward_pre_hook", 1),
    "second hook": (nn.Module, "register_forward_hook", 1),
    "places": (TokenMoves, "attach", 1),
    "guidance": (Branch, "attach", 1),
    "last": (Binding, "attach", 1),
}


@pytest.fixture
def case(family, request):
    return request.getfixturevalue(family)


def recipe_of(family, **options):
    pattern = Clear(3) if family in ("flux", "sd3") else Neighborhood((3, 3, 3))
    return Recipe(pattern, **{"order": "hilbert", "dense_steps": 1, **options})


def guided(family):
    heads = HeadPerturbation(heads=[(1, 0), (2, 1)], scale=2.0)
    return recipe_of(family, order="raster", guidance=heads)


@contextmanager
def stopped(place):
    """Stops that call of the place, after its work but for a hook's; the calls after it do as ever."""
    holder, name, at = place
    original, calls = getattr(holder, name), []

    def stop(*args, **kwargs):
        calls.append(None)
        if len(calls) != at:
            return original(*args, **kwargs)
        if holder is not nn.Module:
            original(*args, **kwargs)
        raise KeyboardInterrupt

    with mock.patch.object(holder, name, stop), pytest.raises(KeyboardInterrupt):
        yield


@FAMILIES
@pytest.mark.parametrize("place", PLACES)
class TestEnable:
    def test_where_nothing_is_enabled(self, case, family, place):
        untouched, before = case.run(case.pipe), state_of(case.pipe.transformer)
        with stopped(PLACES[place]):
            enable(case.pipe, guided(family))
        assert handle_of(case.pipe) is None
        assert state_of(case.pipe.transformer) == before
        assert torch.equal(case.run(case.pipe), untouched)

    def test_an_earlier_recipe_stays(self, case, family, place):
        before = state_of(case.pipe.transformer)
        handle = enable(case.pipe, recipe_of(family))
        expected = case.run(case.pipe)
        with stopped(PLACES[place]):
            enable(case.pipe, guided(family))
        assert handle_of(case.pipe) is handle
        assert torch.equal(case.run(case.pipe), expected)
        disable(case.pipe)
        assert state_of(case.pipe.transformer) == before


@pytest.mark.parametrize("family", ["wan"])
def test_both_transformers_of_a_pipeline(case):
    """Stopped between the two, each of which had a recipe of its own."""
    pipe = case.make(two=True)
    untouched, before = case.run(pipe), [state_of(pipe.transformer), state_of(pipe.transformer_2)]
    enable(pipe.transformer, Recipe(Neighborhood((3, 3, 5))))
    second = enable(pipe.transformer_2, Recipe(Neighborhood((3, 5, 3))))
    expected = case.run(pipe)
    for at in (1, 2):
        with stopped((Binding, "attach", at)):
            enable(pipe, Recipe(Neighborhood((3, 3, 3))))
        assert handle_of(pipe.transformer_2) is second
        assert torch.equal(case.run(pipe), expected)
    disable(pipe)
    assert [state_of(pipe.transformer), state_of(pipe.transformer_2)] == before
    assert torch.equal(case.run(pipe), untouched)


@FAMILIES
@pytest.mark.parametrize(
    "place", [(checkpointing, "detach", 1), (Branch, "detach", 1), (Binding, "detach", 1)], ids=str
)
def test_disable_is_finished_by_another(case, family, place):
    """Also where the earlier recipe is taken off within `enable`, which then stays."""
    untouched, before = case.run(case.pipe), state_of(case.pipe.transformer)
    handle = enable(case.pipe, guided(family))
    expected = case.run(case.pipe)
    with stopped(place):
        enable(case.pipe, recipe_of(family))
    assert handle_of(case.pipe) is handle
    assert torch.equal(case.run(case.pipe), expected)
    with stopped(place):
        disable(case.pipe)
    disable(case.pipe)
    assert state_of(case.pipe.transformer) == before
    assert torch.equal(case.run(case.pipe), untouched)


@FAMILIES
def test_accelerated(case, family):
    outer = enable(case.pipe, recipe_of(family))
    expected = case.run(case.pipe)
    with pytest.raises(SystemExit), accelerated(case.pipe, guided(family)):
        raise SystemExit
    assert handle_of(case.pipe) is outer
    assert torch.equal(case.run(case.pipe), expected)
