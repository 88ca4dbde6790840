"""Wan Animate, ChronoEdit and Helios against diffusers' own attention under dense masks."""

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import Neighborhood
from dit_accel.pipelines import family_named, family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable
from dit_accel.summary import summary

GRID, NEAR = (3, 6, 8), Neighborhood((3, 3, 3))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def matches_masked_dense(tools, masked, layout, inputs, order="hilbert", pattern=NEAR):
    pipe, reference = tools.pipe, tools.make().transformer
    layers = family_of(reference).layers(reference)
    masked(layers, dict.fromkeys(layers, pattern.token_mask(layout)))
    with torch.no_grad():
        stock, expected = pipe.transformer(**inputs)[0], reference(**inputs)[0]
        with accelerated(pipe, Recipe(pattern, order=order, block_size=(16, 16))) as handle:
            close(pipe.transformer(**inputs)[0], expected)
            text, moved = str(summary(pipe)), handle.token_order() is not None
        assert torch.equal(pipe.transformer(**inputs)[0], stock)
    assert not torch.allclose(stock, expected, atol=1e-3)
    return text, moved


@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_wan_animate(animate, masked, order):
    """Poses and faces are by place inside, so that tokens are moved by each layer alone."""
    inputs = animate.inputs(animate.pipe)
    text, moved = matches_masked_dense(animate, masked, TokenLayout(GRID), inputs, order)
    assert not moved
    assert "the face adapter" in text
    adapters = [layer.processor for layer in animate.pipe.transformer.face_adapter]
    enable(animate.pipe, NEAR)
    assert adapters == [layer.processor for layer in animate.pipe.transformer.face_adapter]


@pytest.mark.parametrize("frames", [2, 3])
def test_chrono_edit(chrono, masked, frames):
    """With two frames the second is where the last frame of reasoning would be."""
    inputs = chrono.inputs(chrono.pipe)
    inputs["hidden_states"] = inputs["hidden_states"][:, :, :frames]
    layout, near = TokenLayout((frames, 6, 8)), Neighborhood((2, 3, 3))
    assert matches_masked_dense(chrono, masked, layout, inputs, pattern=near)[1]


HISTORY = {"short": 2, "mid": 2, "long": 5}
COUNTS = {"short": 2 * 6 * 8, "mid": 1 * 3 * 4, "long": 2 * 2 * 2}


@pytest.mark.parametrize("parts", [[], ["short"], ["short", "mid", "long"]], ids=len)
def test_helios(helios, masked, parts):
    """The history stands before the chunk, padded to whole patches, and is attended densely."""
    inputs, first = helios.inputs(helios.pipe), 0
    generator = torch.Generator().manual_seed(2)
    for part in reversed(parts):
        frames = HISTORY[part]
        inputs[f"latents_history_{part}"] = torch.randn(1, 4, frames, 12, 16, generator=generator)
        inputs[f"indices_latents_history_{part}"] = torch.arange(first, first + frames)[None]
        first += frames
    inputs["indices_hidden_states"] = torch.arange(first, first + 3)[None]
    count = sum(COUNTS[part] for part in parts)
    layout = TokenLayout(GRID, text_len=count, text_first=count > 0)
    text, moved = matches_masked_dense(helios, masked, layout, inputs)
    assert not moved
    assert (f"grid 3 x 6 x 8 tokens + {count} history" in text) is (count > 0)


def test_families(animate, chrono, helios, wan):
    names = ["wan-animate", "chrono-edit", "helios", "wan"]
    tools = (animate, chrono, helios, wan)
    assert [family_of(one.pipe.transformer) for one in tools] == [family_named(name) for name in names]
