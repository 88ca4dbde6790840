"""Z-Image: the masked dense transformer's output, filled-up images and captions, lists of samples."""

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.errors import UnavailableError
from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import ByNoise, Clear, Dense, Neighborhood
from dit_accel.pipelines import family_named, family_of
from dit_accel.planning.model_config import published
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable
from dit_accel.summary import summary

FAMILY = family_named("z-image")
CURVE = Recipe(Clear(3), order="hilbert")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def mask_layers(transformer, masked, pattern, layout, layers=None):
    modules = FAMILY.layers(transformer)
    masked(modules, dict.fromkeys(layers or modules, pattern.token_mask(layout)))


def under_masks(zimage, masked, pattern, layers=None, grid=(8, 12), text_len=7, **run):
    """The untouched pipeline's output when diffusers' own attention gets the pattern's token mask too."""
    pipe = zimage.make()
    mask_layers(pipe.transformer, masked, pattern, FAMILY.planned_layout((1, *grid), text_len + 40), layers)
    return zimage.run(pipe, grid=grid, text_len=text_len, **run)


class TestMatchesMaskedDense:
    @pytest.mark.parametrize("order", ["raster", "tile", "hilbert", "auto"])
    @pytest.mark.parametrize("pattern", [Clear(3), Neighborhood((3, 5))], ids=["clear", "neighborhood"])
    def test_orders_and_patterns(self, zimage, masked, pattern, order):
        with accelerated(zimage.pipe, Recipe(pattern, order=order, block_size=(16, 16))):
            expected = under_masks(zimage, masked, pattern, batch=2, steps=2)
            close(zimage.run(zimage.pipe, batch=2, steps=2), expected)

    @pytest.mark.parametrize(
        "run",
        [
            {"batch": 3, "cfg": 3.0, "text_len": 30},
            {"grid": (5, 13), "text_len": 40},
            {"grid": (16, 3), "batch": 2},
        ],
        ids=lambda run: "-".join(f"{k}{v}" for k, v in run.items()).replace(" ", ""),
    )
    def test_runs(self, zimage, masked, run):
        """Of images that fill 32 tokens or not, and captions of one length or several."""
        with accelerated(zimage.pipe, CURVE):
            close(zimage.run(zimage.pipe, **run), under_masks(zimage, masked, Clear(3), **run))

    def test_some_layers(self, zimage, masked):
        with accelerated(zimage.pipe, Recipe({"1": Clear(3)}, order="hilbert")):
            close(zimage.run(zimage.pipe), under_masks(zimage, masked, Clear(3), ["blocks.1"]))


class TestDense:
    def test_is_that_of_diffusers_bit_by_bit(self, zimage):
        dense = zimage.run(zimage.pipe, batch=2, cfg=3.0)
        with accelerated(zimage.pipe, Dense()):
            assert torch.equal(zimage.run(zimage.pipe, batch=2, cfg=3.0), dense)

    def test_disable_is_bit_identical(self, zimage):
        dense = zimage.run(zimage.pipe, batch=2, cfg=3.0)
        before = [module.processor for module in FAMILY.layers(zimage.pipe.transformer).values()]
        with accelerated(zimage.pipe, CURVE):
            assert not torch.allclose(zimage.run(zimage.pipe, batch=2, cfg=3.0), dense, atol=1e-3)
        after = [module.processor for module in FAMILY.layers(zimage.pipe.transformer).values()]
        assert all(a is b for a, b in zip(after, before, strict=True))
        assert torch.equal(zimage.run(zimage.pipe, batch=2, cfg=3.0), dense)

    def test_a_pattern_that_covers_all(self, zimage):
        dense = zimage.run(zimage.pipe, grid=(5, 13), batch=2)
        with accelerated(zimage.pipe, Recipe(Clear(20), order="hilbert")):
            close(zimage.run(zimage.pipe, grid=(5, 13), batch=2), dense)


class TestGeometry:
    @pytest.mark.parametrize(
        ("grid", "captions", "anchor", "text_len", "valid"),
        [
            ((8, 12), (7, 9), None, 32, None),
            ((5, 13), (7, 33), (1, 1, 31), 64, [32, 64]),
            ((5, 7), (64,), (1, 1, 29), 64, None),
        ],
    )
    def test_is_read_from_lists(self, zimage, grid, captions, anchor, text_len, valid):
        inputs = {
            "x": [torch.zeros(4, 1, 2 * grid[0], 2 * grid[1])] * len(captions),
            "cap_feats": [torch.zeros(length, 16) for length in captions],
        }
        expected = TokenLayout((1, *grid), text_len, anchor=anchor)
        assert FAMILY.layout(zimage.pipe.transformer, inputs, {}) == expected
        found = FAMILY.text_valid(inputs, {})
        assert (found if found is None else found.tolist()) == valid

    def test_of_published_models(self):
        model = published("z-image")
        assert model.layout(model.grid(model.transformer(), (1, 1024, 1040))).anchor is None
        assert model.layout(model.grid(model.transformer(), (1, 1008, 1040))).anchor == (1, 1, 1)

    def test_summary_names_what_fills_up(self, zimage):
        enable(zimage.pipe, CURVE)
        zimage.run(zimage.pipe, grid=(5, 13), steps=1)
        expected = "grid 1 x 5 x 13 tokens + 32 text + 31 that fill up the image, attended densely"
        assert expected in str(summary(zimage.pipe))

    def test_steps_and_noise_levels(self, zimage):
        """Its timesteps rise."""
        levels = ByNoise({0.5: Dense(), 0: Clear(3)})
        with accelerated(zimage.pipe, Recipe(levels)) as handle:
            zimage.run(zimage.pipe, steps=4, cfg=2.0)
            densities = list(handle.stats()["step_densities"].values())
        assert len(densities) == 4
        assert densities[0] == 1
        assert densities[-1] < 1


class TestRefuses:
    def test_samples_of_several_sizes(self, zimage):
        inputs = zimage.inputs(zimage.pipe)
        inputs |= {"x": [torch.zeros(4, 1, 16, 24), torch.zeros(4, 1, 16, 16)]}
        inputs["cap_feats"] = inputs["cap_feats"] * 2
        enable(zimage.pipe, CURVE)
        with pytest.raises(ValueError, match=r"must be of one size, got latents of .*disable"):
            zimage.pipe.transformer(**inputs)

    def test_several_images_a_sample(self, zimage):
        inputs = zimage.inputs(zimage.pipe)
        enable(zimage.pipe, CURVE)
        with pytest.raises(ValueError, match=r"Omni's calls of several images .*disable"):
            zimage.pipe.transformer(**inputs | {"x": [[sample] for sample in inputs["x"]]})

    def test_guidance(self, zimage):
        with pytest.raises(UnavailableError, match=r"samples are one tensor, .* use guidance=None"):
            enable(zimage.pipe, Recipe(Dense(), guidance=HeadPerturbation({(0, 0): 1.0})))


def test_family_of(zimage):
    assert family_of(zimage.pipe.transformer) is FAMILY
    assert list(FAMILY.layers(zimage.pipe.transformer)) == ["blocks.0", "blocks.1", "blocks.2"]
