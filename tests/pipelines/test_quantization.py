"""Numeric formats in recipes: per layer, step and noise level, beside guidance; summary and plan."""

from dataclasses import replace

import pytest
import torch

import dit_accel
from dit_accel.errors import UnavailableError
from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import ByNoise, Dense, Neighborhood
from dit_accel.planning.plan import plan
from dit_accel.recipe.recipe import Recipe, presets
from dit_accel.runtime.switching import accelerated, enable
from dit_accel.summary import summary

NEAR, SIZE = Neighborhood((3, 3, 3)), (32, 32)
SPARSE = Recipe(NEAR, block_size=SIZE)
QUANTIZED = replace(SPARSE, quantization="int8")


def called(pipe, inputs, recipe) -> torch.Tensor:
    with torch.no_grad(), accelerated(pipe, recipe):
        return pipe.transformer(**inputs)[0]


class TestWan:
    def test_per_layer(self, wan):
        """A layer that is named last as None has none; the others have it."""
        inputs = wan.inputs(wan.pipe)
        every, none = (called(wan.pipe, inputs, recipe) for recipe in (QUANTIZED, SPARSE))
        last = called(wan.pipe, inputs, replace(SPARSE, quantization={"all": "int8", "blocks.0-1": None}))
        assert 0 < (last - none).norm() < (every - none).norm()
        without = replace(SPARSE, quantization={"all": None})
        assert torch.equal(none, called(wan.pipe, inputs, without))

    def test_dense_steps_and_layers_have_none(self, wan):
        dense = wan.run(wan.pipe, steps=2)
        for recipe in (QUANTIZED, replace(QUANTIZED, attention=Dense())):
            with accelerated(wan.pipe, replace(recipe, dense_steps=2)):
                torch.testing.assert_close(wan.run(wan.pipe, steps=2), dense)
            with accelerated(wan.pipe, replace(recipe, dense_layers={0, 1, 2})):
                torch.testing.assert_close(wan.run(wan.pipe, steps=2), dense)
            with accelerated(wan.pipe, recipe):
                assert not torch.allclose(wan.run(wan.pipe, steps=2), dense, atol=1e-6)

    def test_alone_it_is_dense_attention_in_that_format(self, wan):
        inputs = wan.inputs(wan.pipe)
        dense = called(wan.pipe, inputs, Recipe(Dense()))
        out = called(wan.pipe, inputs, Recipe(Dense(), quantization="int8", block_size=SIZE))
        assert 0 < (out - dense).norm() < 0.02 * dense.norm()
        enable(wan.pipe, Recipe(Dense(), quantization={"blocks.1": "int8-fp8"}, block_size=SIZE))
        wan.run(wan.pipe, steps=1)
        rows = {row["layer"]: row for row in summary(wan.pipe).rows}
        assert rows["blocks.0"]["pattern"] is None
        assert rows["blocks.0"]["note"] == "model's own attention: Dense()"
        assert rows["blocks.1"]["pattern"] == "Dense(), quantization='int8-fp8'"
        assert rows["blocks.1"]["quantization"] == "int8-fp8"
        assert rows["blocks.1"]["backend"] == "auto: gather"
        assert rows["blocks.1"]["density"] == 1

    def test_levels_of_noise_at_which_it_is_dense_are_quantized_too(self, wan):
        changing = ByNoise({0.5: Dense(), 0.0: NEAR})
        enable(wan.pipe, Recipe(changing, quantization="int8", block_size=SIZE))
        wan.run(wan.pipe, steps=1)  # which begins at a noise level of 1
        geometry = dit_accel.runtime.switching.handle_of(wan.pipe).bindings["transformer"].geometry
        assert set(geometry.formats.values()) == {"int8"}
        assert all(attention is not None for attention in geometry.attentions)

    def test_guidance_perturbs_what_is_quantized(self, wan):
        guidance = HeadPerturbation({(1, 1): 1.0}, kind="temperature", temperature=2.0, scale=2.5)
        inputs, transformer = wan.inputs(wan.pipe), wan.pipe.transformer
        with torch.no_grad():
            enable(transformer, QUANTIZED)
            cond = transformer(**inputs)[0]
            with guidance.applied(transformer):
                perturbed = transformer(**inputs)[0]
            actual = called(wan.pipe, inputs, replace(QUANTIZED, guidance=guidance))
        torch.testing.assert_close(actual, cond + 2.5 * (cond - perturbed), rtol=1e-3, atol=1e-4)

    def test_what_cannot_be(self, wan):
        with pytest.raises(ValueError, match=r"`quantization` names some heads of layer blocks\.0"):
            enable(wan.pipe, replace(SPARSE, quantization={"heads.1": "int8"}))
        with pytest.raises(UnavailableError, match="flex does not compute quantization='int8'"):
            enable(wan.pipe, replace(QUANTIZED, backend="flex"))
        enable(wan.pipe, QUANTIZED)
        with pytest.raises(UnavailableError, match="numbers rounded to a few bits have no gradient"):
            wan.pipe.transformer(**wan.inputs(wan.pipe))


def test_plan_names_the_format_and_says_that_it_is_not_counted():
    plain, quantized = (
        plan(Recipe(NEAR, quantization=one), model="tiny-wan", size=(96, 96), frames=17)
        for one in (None, "int8")
    )
    assert quantized.layers[0].pattern == f"{NEAR}, quantization='int8'"
    assert quantized.attention == plain.attention
    assert any("quantization in 'int8' is counted as if it took as long" in note for note in quantized.notes)
    assert not any("quantization" in note for note in plain.notes)


def test_recipes_are_written_and_read():
    recipe = Recipe(NEAR, quantization={"all": "int8", "blocks.0": None})
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert "quantization: {all: int8, blocks.0: null}" in recipe.to_yaml()
    assert Recipe(Dense(), quantization="int8-fp8").tag.startswith("dense+int8-fp8-")
    assert Recipe(NEAR, quantization="int8") != Recipe(NEAR)
    assert recipe != Recipe(NEAR, quantization={"blocks.0": None, "all": "int8"})
    with pytest.raises(ValueError, match=r"`quantization` must be 'int8', 'int8-fp8', .*, got 'fp4'"):
        Recipe(NEAR, quantization="fp4")


def test_every_family_has_a_quantized_preset():
    families = {recipe.family for name, recipe in presets().items() if recipe.quantization == "int8"}
    assert families == {recipe.family for recipe in presets().values()}


@pytest.mark.parametrize("format", ["int8", "int8-fp8", "int8-int8", "int8-int4"])
def test_function_is_the_specification(format):
    layout, generator = dit_accel.TokenLayout((2, 8, 8), text_len=24, text_first=True), torch.Generator()
    q, k, v = torch.randn(3, 2, 2, layout.seq_len, 16, generator=generator.manual_seed(0)).unbind(0)
    options = {"text_valid": torch.tensor([5, 24]), "quantization": format}
    for pattern in (Neighborhood((2, 3, 3)), Dense()):
        out, spec = (
            dit_accel.attention(q, k, v, pattern, layout, backend=backend, **options)
            for backend in ("auto", "reference")
        )
        assert (out - spec).norm() < 1e-3 * spec.norm()
        exact = dit_accel.attention(q, k, v, pattern, layout, text_valid=options["text_valid"])
        assert 1e-4 < (out - exact).norm() / exact.norm() < 0.25
