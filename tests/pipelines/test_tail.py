"""The compensated tail in recipes: per layer, beside guidance, caches and dense steps; summary and plan."""

from dataclasses import replace

import pytest
import torch
from online_pattern import TopBlocks

import dit_accel
from dit_accel.errors import UnavailableError
from dit_accel.guidance import HeadPerturbation
from dit_accel.kernels import pooled_density
from dit_accel.patterns import LocalGlobal, Neighborhood
from dit_accel.planning.plan import plan
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable, handle_of
from dit_accel.summary import summary

NEAR, SIZE = Neighborhood((3, 3, 3)), (16, 16)
TAILED = Recipe(NEAR, block_size=SIZE, tail="pooled")


def called(pipe, inputs, recipe) -> torch.Tensor:
    with torch.no_grad(), accelerated(pipe, recipe):
        return pipe.transformer(**inputs)[0]


class TestWan:
    def test_per_layer(self, wan):
        """A layer that is named last as None has none; the others have it."""
        inputs = wan.inputs(wan.pipe)
        every = called(wan.pipe, inputs, TAILED)
        some = called(wan.pipe, inputs, replace(TAILED, tail={"all": "pooled", "blocks.1": None}))
        assert not torch.equal(every, some)
        none = called(wan.pipe, inputs, replace(TAILED, tail={"all": None}))
        assert torch.equal(none, called(wan.pipe, inputs, replace(TAILED, tail=None)))

    def test_dense_steps_and_layers_have_none(self, wan):
        dense = wan.run(wan.pipe, steps=2)
        with accelerated(wan.pipe, replace(TAILED, dense_steps=2)):
            torch.testing.assert_close(wan.run(wan.pipe, steps=2), dense)
        with accelerated(wan.pipe, replace(TAILED, dense_layers={0, 1, 2})):
            torch.testing.assert_close(wan.run(wan.pipe, steps=2), dense)

    def test_patterns_chosen_by_content(self, wan):
        recipe = Recipe(TopBlocks(0.4), block_size=SIZE, tail="pooled")
        inputs = wan.inputs(wan.pipe)
        expected = called(wan.pipe, inputs, replace(recipe, backend="reference"))
        torch.testing.assert_close(called(wan.pipe, inputs, recipe), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(called(wan.pipe, inputs, replace(recipe, tail=None)), expected, atol=1e-3)

    def test_guidance_perturbs_what_has_a_tail(self, wan):
        guidance = HeadPerturbation({(1, 1): 1.0}, kind="temperature", temperature=2.0, scale=2.5)
        inputs, transformer = wan.inputs(wan.pipe), wan.pipe.transformer
        with torch.no_grad():
            enable(transformer, TAILED)
            cond = transformer(**inputs)[0]
            with guidance.applied(transformer):
                perturbed = transformer(**inputs)[0]
            actual = called(wan.pipe, inputs, replace(TAILED, guidance=guidance))
        torch.testing.assert_close(actual, cond + 2.5 * (cond - perturbed), rtol=1e-4, atol=1e-5)

    def test_step_cache(self, wan):
        from diffusers.hooks import FirstBlockCacheConfig

        wan.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        with accelerated(wan.pipe, TAILED):
            cached = wan.run(wan.pipe, steps=2)
        other = wan.make()
        with accelerated(other, TAILED):
            torch.testing.assert_close(cached, wan.run(other, steps=2))

    def test_summary_counts_whole_blocks_and_pooled_keys(self, wan):
        enable(wan.pipe, replace(TAILED, tail={"blocks.0-1": "pooled"}))
        wan.run(wan.pipe, steps=1)
        rows = {row["layer"]: row for row in summary(wan.pipe).rows}
        with_tail, without = rows["blocks.0"], rows["blocks.2"]
        pooled = pooled_density(handle_of(wan.pipe).bindings["transformer"].geometry.attentions[0].mask)
        assert 1 / 144 <= pooled <= 3 / 144  # three parts of 64 keys at most
        assert (with_tail["tail"], without["tail"]) == ("pooled", None)
        assert with_tail["pattern"] == without["pattern"] + ", tail='pooled'"
        assert with_tail["block_density"] == pytest.approx(without["block_density"] + pooled)
        assert with_tail["density"] == pytest.approx(without["block_density"])  # 144 tokens are whole blocks
        assert with_tail["density"] > without["density"]

    def test_summary_tells_what_calls_with_a_tail_computed(self, wan):
        """Of a layer that chooses, and of one in which one head does: keys of their own, and pooled ones."""
        top = TopBlocks(0.4)
        recipe = Recipe({"0": top, "1/heads.0": top, "1/heads.1": NEAR}, block_size=SIZE, tail="pooled")
        handle = enable(wan.pipe, recipe)
        wan.run(wan.pipe, steps=2)
        rows = {row["layer"]: row for row in summary(wan.pipe).rows}
        layout = dit_accel.TokenLayout((3, 6, 8))
        mask = NEAR.block_mask(layout, SIZE, handle.bindings["transformer"].geometry.order)
        one, two = rows["blocks.0"], rows["blocks.1"]
        assert one["density"] == pytest.approx(1 / 3)
        assert 1 / 3 + 1 / 144 <= one["block_density"] <= 1 / 3 + 3 / 144
        assert two["density"] == pytest.approx((1 / 3 + mask.block_density) / 2)
        pooled = two["block_density"] - two["density"] - pooled_density(mask) / 2  # of the head that chooses
        assert 1 / 144 <= 2 * pooled <= 3 / 144
        stats = handle.stats()
        for name in ("density", "block_density"):
            assert stats[name] == pytest.approx((one[name] + two[name] + 1) / 3)

    def test_what_cannot_be(self, wan):
        with pytest.raises(ValueError, match=r"`tail` names some heads of layer blocks\.0"):
            enable(wan.pipe, replace(TAILED, tail={"heads.1": "pooled"}))
        with pytest.raises(ValueError, match="hides keys on purpose"):
            enable(wan.pipe, Recipe(LocalGlobal(4), tail="pooled"))
        with pytest.raises(UnavailableError, match="by which a tail would be merged"):
            enable(wan.pipe, replace(TAILED, backend="flex"))


def test_plan_counts_the_tail():
    with_tail, without = (
        plan(Recipe(NEAR, tail=tail), model="tiny-wan", size=(96, 96), frames=17) for tail in ("pooled", None)
    )
    assert without.density < with_tail.density < with_tail.block_density
    assert without.block_density < with_tail.block_density < without.block_density + 1 / 64
    assert with_tail.layers[0].pattern == f"{NEAR}, tail='pooled'"
    assert with_tail.attention.ideal < without.attention.ideal


def test_recipes_are_written_and_read():
    recipe = Recipe(NEAR, tail={"all": "pooled", "blocks.0": None})
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert "tail: {all: pooled, blocks.0: null}" in recipe.to_yaml()
    assert Recipe(NEAR, tail="pooled").tag.startswith("neighborhood-3x3x3+tail-")
    assert Recipe(NEAR, tail="pooled") != Recipe(NEAR)
    assert recipe != Recipe(NEAR, tail={"blocks.0": None, "all": "pooled"})
    for tail in ("linear", {"all": "linear"}, 3):
        with pytest.raises(ValueError, match="`tail` must be 'pooled', None or a mapping"):
            Recipe(NEAR, tail=tail)


def test_function_is_the_specification_and_nearer_to_dense():
    """Padded text first, two samples; of smooth keys and values, whose means say much of them."""
    layout, generator = dit_accel.TokenLayout((4, 8, 8), text_len=24, text_first=True), torch.Generator()
    q, k, v = torch.randn(3, 2, 2, layout.seq_len, 16, generator=generator.manual_seed(0)).unbind(0)
    k[:, :, 24:], v[:, :, 24:] = k[:, :, 24:25] + 0.1 * k[:, :, 24:], v[:, :, 24:25] + 0.1 * v[:, :, 24:]
    options = {"text_valid": torch.tensor([5, 24]), "tail": "pooled"}
    out, lse = dit_accel.attention(q, k, v, NEAR, layout, **options, return_lse=True)
    spec = dit_accel.attention(q, k, v, NEAR, layout, **options, backend="reference", return_lse=True)
    torch.testing.assert_close(out, spec[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse, spec[1], atol=1e-5, rtol=1e-4)
    dense = dit_accel.attention(q, k, v, dit_accel.patterns.Dense(), layout, **options)
    without = dit_accel.attention(q, k, v, NEAR, layout, **{**options, "tail": None})
    assert (out - dense).norm() < 0.2 * (without - dense).norm()
