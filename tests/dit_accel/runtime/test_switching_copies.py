"""Copies of an enabled transformer or pipeline, by `deepcopy`, `pickle` and `torch.save`."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from left_behind import state_of
from torch.utils.checkpoint import checkpoint

from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import Clear, Neighborhood, SparseVideoGen
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import disable, enable, handle_of
from dit_accel.summary import summary

FAMILIES = pytest.mark.parametrize("family", ["flux", "sd3", "wan", "hunyuan"])


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "an old pickle": lambda value: pickle.loads(pickle.dumps(value, protocol=2)),
    "torch.save": saved,
    "twice": lambda value: saved(copy.deepcopy(value)),
}


@pytest.fixture
def case(family, request):
    return request.getfixturevalue(family)


def recipes(family):
    image = family in ("flux", "sd3")
    near = Clear(3) if image else Neighborhood((3, 3, 3))
    yield Recipe(near, order="hilbert", dense_steps=1)
    yield Recipe({"all": near, "heads.1": Clear(2) if image else SparseVideoGen(0.5, block_size=16)})
    yield Recipe(near, guidance=HeadPerturbation(heads=[(1, 0), (2, 1)], scale=2.0))


@FAMILIES
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ran", [False, True], ids=["before a run", "after a run"])
def test_transformer(case, family, way, ran):
    """The copy is enabled, on its own, and can be disabled bit for bit; so can the original."""
    pipe, original = case.pipe, case.pipe.transformer
    untouched, before = case.run(pipe), state_of(original)
    for recipe in recipes(family):
        handle = enable(pipe, recipe)
        expected = case.run(pipe)
        if not ran:
            handle = enable(pipe, recipe)
        stats = handle.stats()
        twin = WAYS[way](original)
        assert handle_of(twin).recipe == recipe
        assert handle_of(twin) is not handle
        patterns = [[row["pattern"] for row in summary(one).rows] for one in (twin, original)]
        assert patterns[0] == patterns[1]
        pipe.transformer = twin
        assert torch.equal(case.run(pipe), expected)
        assert handle.stats() == stats
        assert handle_of(twin).stats()["calls"] == 3
        disable(pipe)  # the twin alone
        assert torch.equal(case.run(pipe), untouched)
        assert state_of(twin).keys() == before.keys()
        assert [parts[:1] for parts in state_of(twin).values()] == [parts[:1] for parts in before.values()]
        assert not any(hooks for _, parts, _ in state_of(twin).values() for hooks in parts)
        pipe.transformer = original
        assert handle.active
        assert torch.equal(case.run(pipe), expected)
        disable(pipe)
        assert state_of(original) == before
        assert torch.equal(case.run(pipe), untouched)


@FAMILIES
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_pipeline(case, family, way):
    untouched = case.run(case.pipe)
    recipe = next(recipes(family))
    enable(case.pipe, recipe)
    expected = case.run(case.pipe)
    twin = WAYS[way](case.pipe)
    disable(case.pipe)
    assert torch.equal(case.run(case.pipe), untouched)
    assert torch.equal(case.run(twin), expected)
    assert handle_of(twin).stats()["dense_steps"] == [0]
    with torch.no_grad():
        next(twin.transformer.parameters()).zero_()
    assert torch.equal(case.run(case.pipe), untouched)
    disable(twin)
    assert handle_of(twin) is None


@FAMILIES
def test_with_checkpointing(case, family):
    transformer, inputs = case.pipe.transformer, case.inputs(case.pipe)
    function = functools.partial(checkpoint, use_reentrant=False)  # diffusers' own cannot be pickled
    transformer.enable_gradient_checkpointing(function)
    enable(transformer, next(recipes(family)))

    def gradient(transformer):
        transformer.zero_grad()
        transformer(**inputs)[0].square().mean().backward()
        return [p.grad.clone() for p in transformer.parameters() if p.grad is not None]

    expected = gradient(transformer)
    for way in ("deepcopy", "torch.save"):
        twin = WAYS[way](transformer)
        handle_of(twin).begin(3)
        handle_of(transformer).begin(3)
        assert all(map(torch.equal, gradient(twin), gradient(transformer)))
        disable(twin)
        assert twin._gradient_checkpointing_func.func is checkpoint
    assert len(expected) > 20


@FAMILIES
def test_save_pretrained(case, family, tmp_path):
    """The files of an enabled transformer are those of an untouched one, byte for byte."""
    transformer = case.pipe.transformer
    transformer.save_pretrained(tmp_path / "before")
    for i, recipe in enumerate(recipes(family)):
        enable(case.pipe, recipe)
        case.run(case.pipe, steps=2)
        transformer.save_pretrained(tmp_path / f"enabled {i}")
        contents = [
            {path.name: path.read_bytes() for path in folder.iterdir()}
            for folder in (tmp_path / "before", tmp_path / f"enabled {i}")
        ]
        assert contents[0] == contents[1]
        assert len(contents[0]) == 2
