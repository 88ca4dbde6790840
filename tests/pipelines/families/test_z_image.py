"""Z-Image: the masked dense transformer's output, filled-up images and captions, lists of samples."""

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.errors import UnavailableError
from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import ByNoise, Clear, Dense
from dit_accel.pipelines import family_named, family_of
from dit_accel.planning.model_config import published
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable
from dit_accel.summary import summary

FAMILY = family_named("z-image")
CURVE = Recipe(Clear(3), order="hilbert")


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
