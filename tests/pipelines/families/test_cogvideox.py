"""CogVideoX against diffusers' own attention under dense masks, with both kinds of positions."""

import json

import pytest
import torch
from diffusers.models.attention_processor import FusedCogVideoXAttnProcessor2_0

from dit_accel import TokenLayout
from dit_accel.errors import UnavailableError
from dit_accel.patterns import ByNoise, Dense, Neighborhood, Radial
from dit_accel.pipelines import family_named
from dit_accel.planning.model_config import all_published
from dit_accel.planning.plan import plan
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable

FAMILY = family_named("cogvideox")
GRID, NEAR = (3, 6, 8), Neighborhood((3, 3, 3))
LAYOUT = TokenLayout(GRID, text_len=7, text_first=True)
SINUSOIDS = {"use_rotary_positional_embeddings": False}  # added where tokens are embedded
PAIRS = {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 16}  # of frames; 1.5 with an image


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def under_masks(cogvideox, masked, pattern, layers=None, **config):
    pipe = cogvideox.make(**config)
    modules = FAMILY.layers(pipe.transformer)
    masked(modules, dict.fromkeys(layers or modules, pattern.token_mask(LAYOUT)))
    return pipe


@pytest.mark.parametrize("order", ["raster", "hilbert"])
@pytest.mark.parametrize("config", [{}, SINUSOIDS], ids=["rotary", "sinusoids"])
@pytest.mark.parametrize("pattern", [NEAR, Radial(0.2, block_size=16)], ids=["near", "radial"])
def test_matches_masked_dense(cogvideox, masked, pattern, config, order):
    run = {"batch": 2, "cfg": 3.0, "steps": 1}
    expected = cogvideox.run(under_masks(cogvideox, masked, pattern, **config), **run)
    pipe = cogvideox.make(**config)
    stock = cogvideox.run(pipe, **run)
    with accelerated(pipe, Recipe(pattern, order=order, block_size=(16, 16))):
        close(cogvideox.run(pipe, **run), expected)
    assert torch.equal(cogvideox.run(pipe, **run), stock)
    assert not torch.allclose(stock, expected, atol=1e-3)


def test_tokens_of_two_frames(cogvideox, masked):
    """1.5, its image-to-video transformer with `ofs`."""
    reference = under_masks(cogvideox, masked, NEAR, **PAIRS).transformer
    transformer, generator = cogvideox.make(**PAIRS).transformer, torch.Generator().manual_seed(1)
    inputs = cogvideox.inputs(cogvideox.pipe)
    frames = torch.randn(1, 6, 4, 12, 16, generator=generator)
    inputs |= {"hidden_states": frames, "ofs": torch.tensor([2.0])}
    enable(transformer, Recipe(NEAR, order="hilbert"))
    with torch.no_grad():
        close(transformer(**inputs)[0], reference(**inputs)[0])


def test_some_layers_and_fused_projections(cogvideox, masked):
    reference = under_masks(cogvideox, masked, NEAR, layers=["blocks.1"])
    expected = cogvideox.run(reference, steps=1)
    pipe = cogvideox.make()
    pipe.transformer.fuse_qkv_projections()
    with accelerated(pipe, Recipe({"blocks.1": NEAR}, order="hilbert")):
        close(cogvideox.run(pipe, steps=1), expected)
    kept = pipe.transformer.transformer_blocks[0].attn1.processor
    assert type(kept) is FusedCogVideoXAttnProcessor2_0


def test_it_is_no_flow(cogvideox):
    enable(cogvideox.pipe, ByNoise({0.5: Dense(), 0: NEAR}))
    with pytest.raises(UnavailableError, match=r"needs a scheduler of flows.* name steps by number"):
        cogvideox.run(cogvideox.pipe)
    handle = enable(cogvideox.pipe, Recipe(NEAR, dense_steps={0, -1}))
    cogvideox.run(cogvideox.pipe, steps=4, cfg=2.0)
    assert handle.stats()["dense_steps"] == [0, 3]


def test_plans(cogvideox, tmp_path):
    """The last token of an odd number of latent frames is filled up, as the pipeline does."""
    model = all_published()["cogvideox1.5-5b"]
    assert model.grid(model.transformer(), model.size) == (11, 48, 85)
    cogvideox.pipe.save_pretrained(tmp_path)
    (tmp_path / "vae").mkdir()
    vae = {"_class_name": "AutoencoderKLCogVideoX", "temporal_compression_ratio": 4.0}
    (tmp_path / "vae/config.json").write_text(json.dumps(vae | {"block_out_channels": [8] * 4}))
    answer = plan(NEAR, model=str(tmp_path), size=(128, 96), frames=9)
    assert (answer.grid, answer.tokens) == (GRID, 144 + 226)
