"""Mochi against diffusers' own attention under dense masks, each sample with its own text."""

import json

import pytest
import torch
from diffusers import MochiPipeline

from dit_accel import TokenLayout
from dit_accel.patterns import Dense, Neighborhood, Radial
from dit_accel.pipelines import family_named
from dit_accel.planning.plan import plan
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable

FAMILY = family_named("mochi")
GRID, NEAR = (3, 6, 8), Neighborhood((3, 3, 3))
LAYOUT = TokenLayout(GRID, text_len=7)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def under_masks(mochi, masked, pattern, layers=None):
    pipe = mochi.make()
    modules = FAMILY.layers(pipe.transformer)
    masked(modules, dict.fromkeys(layers or modules, pattern.token_mask(LAYOUT)))
    return pipe


@pytest.mark.parametrize("order", ["raster", "hilbert"])
@pytest.mark.parametrize("pattern", [NEAR, Radial(0.2, block_size=16)], ids=["near", "radial"])
def test_matches_masked_dense(mochi, masked, pattern, order):
    """Of samples with 5 and with 2 tokens of text, in both halves of guidance."""
    run = {"batch": 2, "cfg": 3.0, "steps": 1}
    expected, stock = mochi.run(under_masks(mochi, masked, pattern), **run), mochi.run(mochi.pipe, **run)
    with accelerated(mochi.pipe, Recipe(pattern, order=order, block_size=(16, 16))):
        close(mochi.run(mochi.pipe, **run), expected)
    assert torch.equal(mochi.run(mochi.pipe, **run), stock)
    assert not torch.allclose(stock, expected, atol=1e-3)


def test_some_layers(mochi, masked):
    """The others keep diffusers' processor, in the order of these."""
    expected = mochi.run(under_masks(mochi, masked, NEAR, layers=["blocks.1"]), batch=2, steps=1)
    with accelerated(mochi.pipe, Recipe({"blocks.1": NEAR}, order="hilbert")):
        close(mochi.run(mochi.pipe, batch=2, steps=1), expected)


def test_heads_that_are_dense_hide_padded_text(mochi, masked):
    masks = torch.stack([NEAR.token_mask(LAYOUT), Dense().token_mask(LAYOUT)])
    reference = mochi.make()
    masked(FAMILY.layers(reference.transformer), dict.fromkeys(FAMILY.layers(reference.transformer), masks))
    with accelerated(mochi.pipe, Recipe({"heads.0": NEAR}, order="hilbert")):
        close(mochi.run(mochi.pipe, batch=2, steps=1), mochi.run(reference, batch=2, steps=1))


def test_padding_must_come_last(mochi):
    inputs = mochi.inputs(mochi.pipe)
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].flip(1)
    enable(mochi.pipe, NEAR)
    with pytest.raises(ValueError, match="must be ones followed by zeros"):
        mochi.pipe.transformer(**inputs)


def test_its_own_pipeline_whose_timesteps_rise(mochi):
    """From 0 for pure noise: of four steps two are above a noise level of 0.98."""
    pipe = MochiPipeline(mochi.pipe.scheduler, None, None, None, mochi.pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))
    prompt = {"prompt_embeds": embeds, "prompt_attention_mask": torch.ones(1, 7).bool()}
    prompt |= {f"negative_{name}": x for name, x in prompt.items()}
    handle = enable(pipe, Recipe(NEAR, dense_steps={"sigma": (0.98, 1.0)}))
    pipe(**prompt, num_frames=13, height=96, width=128, num_inference_steps=4, output_type="latent")
    assert handle.stats()["dense_steps"] == [0, 1]
    assert handle.stats()["steps"] == 4


def test_plans(mochi, tmp_path):
    mochi.pipe.save_pretrained(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text(json.dumps({"_class_name": "AutoencoderKLMochi"}))
    answer = plan(NEAR, model=str(tmp_path), size=(128, 96), frames=13)
    assert (answer.grid, answer.tokens) == (GRID, 144 + 256)
    with pytest.raises(ValueError, match="`frames` must be a multiple of 6 plus 1"):
        plan(NEAR, model=str(tmp_path), size=(128, 96), frames=17)
