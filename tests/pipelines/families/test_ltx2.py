"""LTX-2: video tokens against diffusers' own attention under dense masks, audio beside them untouched."""

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import Neighborhood, Radial
from dit_accel.pipelines import family_named
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable
from dit_accel.summary import summary

FAMILY = family_named("ltx-2")
GRID, NEAR = (3, 6, 8), Neighborhood((3, 3, 3))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def under_masks(ltx2, masked, pattern, layout, **config):
    transformer = ltx2.make(**config).transformer
    masked(FAMILY.layers(transformer), dict.fromkeys(FAMILY.layers(transformer), pattern.token_mask(layout)))
    return transformer


@pytest.mark.parametrize("rope", ["split", "interleaved"])
@pytest.mark.parametrize("order", ["raster", "hilbert"])
@pytest.mark.parametrize("pattern", [NEAR, Radial(0.2, block_size=16)], ids=["near", "radial"])
def test_both_streams_match_masked_dense(ltx2, masked, pattern, order, rope):
    """Audio hears the video wherever its tokens stand."""
    pipe, inputs = ltx2.make(rope_type=rope), ltx2.inputs(ltx2.pipe)
    reference = under_masks(ltx2, masked, pattern, TokenLayout(GRID), rope_type=rope)
    before = [
        m.processor for n, m in pipe.transformer.named_modules() if "attn" in n and hasattr(m, "processor")
    ]
    with accelerated(pipe, Recipe(pattern, order=order, block_size=(16, 16))), torch.no_grad():
        found, expected = pipe.transformer(**inputs), reference(**inputs)
        close(found[0], expected[0])
        close(found[1], expected[1])
        whole = pipe.transformer(**inputs | {"return_dict": True})
        assert torch.equal(whole.sample, found[0])
        assert torch.equal(whole.audio_sample, found[1])
        after = [
            m.processor
            for n, m in pipe.transformer.named_modules()
            if "attn" in n and hasattr(m, "processor")
        ]
    assert sum(a is not b for a, b in zip(after, before, strict=True)) == 3
    assert len(before) == 3 * 6


def test_keyframes_are_attended_densely(ltx2, masked):
    """Behind the video, with a timestep, a mark and coordinates for every token."""
    config = {"use_keyframes_abs_pos_embedding": True}
    pipe, inputs = ltx2.make(**config), ltx2.inputs(ltx2.pipe)
    reference = under_masks(ltx2, masked, NEAR, TokenLayout(GRID, text_len=48), **config)
    with torch.no_grad():
        for transformer in (pipe.transformer, reference):
            transformer.keyframes_abs_pos_embedding.copy_(torch.linspace(-1, 1, 32))
    generator = torch.Generator().manual_seed(1)
    coords = pipe.transformer.rope.prepare_video_coords(1, 3, 6, 8, "cpu")
    inputs |= {
        "hidden_states": torch.randn(1, 192, 4, generator=generator),
        "timestep": torch.linspace(0, 900, 192)[None],
        "audio_timestep": torch.tensor([500.0]),
        "video_keyframes_mask": (torch.arange(192) % 5 == 0)[None, :, None].float(),
        "video_coords": torch.cat([coords, coords[:, :, 48:96]], dim=2),
    }
    enable(pipe, Recipe(NEAR, order="hilbert"))
    with torch.no_grad():
        found, expected = pipe.transformer(**inputs), reference(**inputs)
    close(found[0], expected[0])
    close(found[1], expected[1])
    text = str(summary(pipe))
    assert "grid 3 x 6 x 8 tokens + 48 keyframe and reference" in text
    assert "dense under every recipe: audio's self-attention;" in text


def test_spatio_temporal_guidance(ltx2, masked):
    """A pass whose blocks give their values alone calls no attention there."""
    config = {"perturbed_attn": True}
    pipe, inputs = ltx2.make(**config), ltx2.inputs(ltx2.pipe)
    reference = under_masks(ltx2, masked, NEAR, TokenLayout(GRID), **config)
    enable(pipe, Recipe(NEAR, order="hilbert"))
    with torch.no_grad():
        for given in ({}, {"spatio_temporal_guidance_blocks": [1]}, {"isolate_modalities": True}):
            close(pipe.transformer(**inputs | given)[0], reference(**inputs | given)[0])


def test_what_is_refused(ltx2):
    inputs = ltx2.inputs(ltx2.pipe)
    enable(ltx2.pipe, NEAR)
    with pytest.raises(ValueError, match=r"`video_self_attention_mask` is not supported .*disable"):
        ltx2.pipe.transformer(**inputs | {"video_self_attention_mask": torch.ones(1, 144, 144)})
    with pytest.raises(ValueError, match=r"says \(3, 6, 9\) frames, rows and columns of its 144"):
        ltx2.pipe.transformer(**inputs | {"width": 9})
