"""Families of images against diffusers' own attention under dense masks: orders, sizes, batches, layers."""

import pytest
import torch
from dense_masks import close, under_masks

from dit_accel.patterns import Clear, Neighborhood
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated

NAMES = ("chroma", "flux2", "hunyuanimage", "qwen", "zimage")
CURVE = Recipe(Clear(3), order="hilbert")


@pytest.fixture(params=NAMES)
def tools(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("order", ["raster", "tile", "hilbert", "auto"])
@pytest.mark.parametrize("pattern", [Clear(3), Neighborhood((3, 5))], ids=["clear", "neighborhood"])
def test_orders_and_patterns(tools, masked, pattern, order):
    with accelerated(tools.pipe, Recipe(pattern, order=order, block_size=(16, 16))):
        expected = under_masks(tools, masked, pattern, batch=2, steps=2)
        close(tools.run(tools.pipe, batch=2, steps=2), expected)


RUNS = [
    {"batch": 3, "cfg": 3.0, "text_len": 10},
    {"grid": (5, 13), "text_len": 40, "steps": 1},
    {"grid": (16, 3), "batch": 2},
]


@pytest.mark.parametrize("run", RUNS, ids=["guided", "odd", "narrow"])
def test_runs(tools, masked, run):
    """Prompts of one length or several, and of Z-Image images that fill 32 tokens or not."""
    with accelerated(tools.pipe, CURVE):
        close(tools.run(tools.pipe, **run), under_masks(tools, masked, Clear(3), **run))


def test_some_layers(tools, masked):
    """The second and the third: of two kinds of blocks the last of one and the first of the other."""
    names = list(family_of(tools.pipe.transformer).layers(tools.pipe.transformer))
    with accelerated(tools.pipe, Recipe({"1-2": Clear(3)}, order="hilbert")):
        expected = under_masks(tools, masked, Clear(3), names[1:3], batch=2)
        close(tools.run(tools.pipe, batch=2), expected)


def test_sparse_attention_is_another(tools):
    dense = tools.run(tools.pipe)
    with accelerated(tools.pipe, CURVE):
        assert not torch.allclose(tools.run(tools.pipe), dense, atol=1e-3)
