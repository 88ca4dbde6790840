"""Kandinsky 5 against diffusers' own attention under dense masks, and NABLA, which stays its own."""

import pytest
import torch
from pattern_cases import VIDEO

from dit_accel import TokenLayout
from dit_accel.patterns import Dense, Neighborhood
from dit_accel.pipelines import family_named
from dit_accel.planning.plan import plan
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable

FAMILY = family_named("kandinsky-5")
GRID, NEAR = (3, 6, 8), Neighborhood((3, 3, 3))


def close(actual, expected):
    """diffusers rounds queries and keys to bf16 in every dtype, where fp32's last bit may decide."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


CASES = [(NEAR, "raster"), *((pattern, "hilbert") for pattern in VIDEO.values())]


@pytest.mark.parametrize(("pattern", "order"), CASES, ids=["near-raster", *VIDEO])
def test_matches_masked_dense(kandinsky5, masked, pattern, order):
    """With outputs in all three forms: diffusers gives a bare tensor without `return_dict`."""
    inputs, reference = kandinsky5.inputs(kandinsky5.pipe), kandinsky5.make().transformer
    layers = FAMILY.layers(reference)
    masked(layers, dict.fromkeys(layers, pattern.token_mask(TokenLayout(GRID))))
    stock = kandinsky5.pipe.transformer(**inputs).sample
    with torch.no_grad(), accelerated(kandinsky5.pipe, Recipe(pattern, order=order, block_size=(16, 16))):
        found, expected = kandinsky5.pipe.transformer(**inputs).sample, reference(**inputs).sample
        close(found, expected)
        assert torch.equal(kandinsky5.pipe.transformer(**inputs | {"return_dict": False}), found)
    assert torch.equal(kandinsky5.pipe.transformer(**inputs).sample, stock)
    assert torch.allclose(stock, expected, atol=1e-2) is (pattern == Dense())


def test_nabla_is_refused_with_what_to_take(kandinsky5):
    inputs = kandinsky5.inputs(kandinsky5.pipe) | {"sparse_params": {"to_fractal": True, "P": 0.9}}
    enable(kandinsky5.pipe, NEAR)
    with pytest.raises(ValueError, match=r"attends by NABLA .*kandinsky-5-nabla.*disable"):
        kandinsky5.pipe.transformer(**inputs)


def test_heads_and_plan(kandinsky5):
    assert FAMILY.heads(kandinsky5.pipe.transformer) == (2, 16)
    answer = plan(NEAR, family="kandinsky-5", size=(128, 96), frames=9, steps=4)
    assert (answer.grid, answer.heads, answer.head_dim) == (GRID, 28, 64)
