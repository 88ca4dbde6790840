"""Chroma: masks of numbers, by which padded text counts less, and of booleans, by which it is hidden."""

import pytest
import torch
from dense_masks import close, mask_layers, under_masks

from dit_accel.patterns import Clear, Rectified
from dit_accel.pipelines import family_named, family_of
from dit_accel.planning.model_config import published
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable

FAMILY = family_named("chroma")
CURVE = Recipe(Clear(3), order="hilbert")
NUMBERS_OR_NOT = pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=["numbers", "booleans"])


class TestMasks:
    @NUMBERS_OR_NOT
    def test_matches_masked_dense(self, chroma, masked, dtype):
        run = {"batch": 2, "cfg": 3.0, "steps": 2, "mask_dtype": dtype}
        with accelerated(chroma.pipe, CURVE):
            close(chroma.run(chroma.pipe, **run), under_masks(chroma, masked, Clear(3), **run))

    @NUMBERS_OR_NOT
    def test_a_pattern_that_covers_all(self, chroma, dtype):
        run = {"batch": 2, "steps": 2, "mask_dtype": dtype}
        stock = chroma.run(chroma.pipe, **run)
        with accelerated(chroma.pipe, Recipe(Clear(20), order="hilbert")):
            close(chroma.run(chroma.pipe, **run), stock)

    def test_none(self, chroma, masked):
        inputs = chroma.inputs(chroma.pipe) | {"attention_mask": None}
        reference = chroma.make().transformer
        mask_layers(reference, masked, Clear(3), FAMILY.planned_layout((1, 8, 12), 7))
        enable(chroma.pipe, CURVE)
        with torch.no_grad():
            close(chroma.pipe.transformer(**inputs)[0], reference(**inputs)[0])

    @NUMBERS_OR_NOT
    def test_padded_text_counts_only_by_numbers(self, chroma, dtype):
        inputs = chroma.inputs(chroma.pipe)
        inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
        text = inputs["encoder_hidden_states"].clone()
        text[:, -2:] = text[:, -2:].flip(-1)  # the two places that are padded
        enable(chroma.pipe, CURVE)
        with torch.no_grad():
            found = chroma.pipe.transformer(**inputs)[0]
            other = chroma.pipe.transformer(**inputs | {"encoder_hidden_states": text})[0]
        assert torch.allclose(found, other, rtol=1e-4, atol=1e-5) is (dtype == torch.bool)

    def test_rectified_attention_knows_its_share(self, chroma):
        """It keeps all blocks here, and is merged with padded text by its log-sum-exp."""
        stock = chroma.run(chroma.pipe, steps=2)
        with accelerated(chroma.pipe, Rectified(mass=1, block_size=32)):
            close(chroma.run(chroma.pipe, steps=2), stock)

    @pytest.mark.parametrize(
        ("hidden", "message"),
        [(0, "`attention_mask` must be ones followed by zeros"), (30, "must be one for all image tokens")],
    )
    def test_others_are_refused(self, chroma, hidden, message):
        inputs = chroma.inputs(chroma.pipe)
        inputs["attention_mask"][:, hidden] = 0
        enable(chroma.pipe, CURVE)
        with pytest.raises(ValueError, match=rf"{message}.*disable"):
            chroma.pipe.transformer(**inputs)


def test_family_of(chroma):
    assert family_of(chroma.pipe.transformer) is FAMILY
    names = ["double.0", "double.1", "single.0", "single.1"]
    assert list(FAMILY.layers(chroma.pipe.transformer)) == names


def test_the_published_model(chroma):
    """It has diffusers' defaults, and an example of its inputs is what the pipeline passes."""
    model = published("chroma")
    transformer = model.transformer()
    assert {name: transformer.config[name] for name in model.config} == model.config
    grid = model.grid(transformer, (1, 512, 1024))
    assert (grid, model.layout(grid).seq_len) == ((1, 32, 64), 512 + 2048)
    example = FAMILY.example_inputs(chroma.pipe.transformer.config, (1, 8, 12), 7, torch.zeros)
    passed = chroma.inputs(chroma.pipe)
    assert {name: x.shape for name, x in example.items()} == {name: passed[name].shape for name in example}
