"""SkyReels-V2: Wan's weights, a timestep per frame, and chunk-causal attention without its mask."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from largest_mask import Largest

from dit_accel import TokenLayout, pipelines, summary
from dit_accel.errors import UnavailableError
from dit_accel.patterns import ByNoise, ChunkCausal, Dense, Neighborhood, Radial, Routed
from dit_accel.planning.plan import plan
from dit_accel.recipe.recipe import Recipe, presets
from dit_accel.runtime.switching import accelerated, enable

NEAR = Neighborhood((3, 3, 3))
GRID = (6, 6, 8)
LAYOUT = TokenLayout(GRID)
FORCING = "SkyReelsV2DiffusionForcingPipeline"


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def inputs(forcing=True, grid=GRID, batch=1):
    """Of a call; each chunk of 3 frames is at a timestep of its own."""
    generator = torch.Generator().manual_seed(1)
    frames, rows, columns = grid
    timestep = torch.tensor([900.0, 400.0]).repeat_interleave(3)[:frames].expand(batch, -1)
    return {
        "hidden_states": torch.randn(batch, 4, frames, 2 * rows, 2 * columns, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
        "timestep": timestep if forcing else torch.full((batch,), 500.0),
        "enable_diffusion_forcing": forcing,
    }


@torch.no_grad()
def predicted(transformer, **given):
    return transformer(**given)[0]


def expected(skyreels, masked, pattern, chunk, given):
    """diffusers' own attention under the pattern's token mask; of the model's own mask it sees to itself."""
    transformer = skyreels.make().transformer
    transformer._set_ar_attention(chunk)
    layers = {f"blocks.{i}": block.attn1 for i, block in enumerate(transformer.blocks)}
    masked(layers, dict.fromkeys(layers, pattern.token_mask(LAYOUT)))
    return predicted(transformer, **given)


@pytest.mark.parametrize(
    "pattern", [Dense(), NEAR, Radial(0.2, block_size=16)], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize(("chunk", "forcing"), [(1, False), (1, True), (2, False), (3, True)])
def test_matches_dense_attention_under_masks(skyreels, masked, chunk, forcing, pattern):
    """In an order that moves tokens, within their frame where frames have timesteps of their own."""
    transformer, given = skyreels.pipe.transformer, inputs(forcing, batch=2)
    transformer._set_ar_attention(chunk)
    stock = predicted(transformer, **given)
    with accelerated(transformer, Recipe(pattern, order="tile", block_size=(32, 16))) as handle:
        found, order = predicted(transformer, **given), handle.token_order()
    close(found, expected(skyreels, masked, pattern, chunk, given))
    assert torch.equal(predicted(transformer, **given), stock)
    if pattern == NEAR:
        assert not torch.allclose(found, stock, atol=1e-3)
        in_frames = order // 48 == torch.arange(len(order)) // 48
        assert bool(in_frames.all()) is (chunk > 1 or forcing)


def test_dense_steps_and_layers_are_chunk_causal(skyreels):
    transformer, given = skyreels.pipe.transformer, inputs()
    transformer._set_ar_attention(3)
    stock = predicted(transformer, **given)
    for recipe in (
        Recipe(NEAR, dense_steps=9, order="tile"),
        Recipe(NEAR, dense_steps={"sigma": (0.5, 1.0)}),
        Recipe(NEAR, dense_layers=3),
        Recipe(NEAR, min_tokens=9_999, dense_steps=1),
        Recipe(ByNoise({0.5: Dense(), 0: NEAR})),
    ):
        with accelerated(transformer, recipe) as handle:
            close(predicted(transformer, **given), stock)
            assert handle.stats()["density"] == pytest.approx(0.75)


def test_the_mask_is_never_made(skyreels):
    """Of 288 tokens diffusers makes 288 x 288; here the guard's look at the prediction is the most."""
    transformer, given = skyreels.pipe.transformer, inputs()
    transformer._set_ar_attention(3)
    with Largest() as stock:
        predicted(transformer, **given)
    assert stock.elements == LAYOUT.seq_len**2
    with accelerated(transformer, Recipe(Dense())):
        predicted(transformer, **given)
        with Largest() as ours:
            predicted(transformer, **given)
    assert ours.elements <= given["hidden_states"].numel() < LAYOUT.seq_len**2


def test_the_configuration_keeps_its_values(skyreels, tmp_path):
    """Only forward, in its call, is not shown that it should make a mask."""
    transformer = skyreels.pipe.transformer
    transformer._set_ar_attention(3)
    before = transformer.config
    seen = []
    with accelerated(transformer, NEAR):
        note = lambda *_: seen.append(transformer.config.num_frame_per_block)  # noqa: E731
        with transformer.blocks[0].register_forward_hook(note):
            predicted(transformer, **inputs())
        thread = threading.Thread(target=note)
        thread.start()
        thread.join()
        assert seen == [1, 3]
        assert transformer.config.num_frame_per_block == 3
        assert dict(transformer.config) == dict(before)
        transformer._set_ar_attention(2)
        predicted(transformer, **inputs())
        assert transformer.config.num_frame_per_block == 2
        transformer.save_pretrained(tmp_path)
        assert copy.deepcopy(transformer).config.num_frame_per_block == 2
    assert type(transformer.config) is type(before)
    assert type(transformer).from_pretrained(tmp_path).config.num_frame_per_block == 2


def test_what_is_refused(skyreels):
    transformer = skyreels.pipe.transformer
    transformer._set_ar_attention(4)
    with accelerated(transformer, NEAR), pytest.raises(ValueError, match=r"must divide .*, got 4 for 6"):
        predicted(transformer, **inputs())
    transformer._set_ar_attention(3)
    tail, to_come = Recipe(NEAR, tail="pooled"), "would let chunks see frames to come"
    with accelerated(transformer, tail), pytest.raises(UnavailableError, match=to_come):
        predicted(transformer, **inputs())
    with accelerated(transformer, Routed(top_k=0.5)), pytest.raises(TypeError, match="static pattern"):
        predicted(transformer, **inputs())


@pytest.mark.parametrize(("ar_step", "chunk"), [(0, None), (3, 3)], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_diffusion_forcing_pipelines(skyreels, masked, cfg, ar_step, chunk):
    """As the pipeline calls the transformer: chunks that lag behind, and parts of the video that are done."""
    run = {"grid": GRID, "steps": 4, "cfg": cfg, "ar_step": ar_step, "causal_block_size": chunk}
    run |= {"base_num_frames": 21, "prompt": None}
    pipe = skyreels.make(pipeline=FORCING)
    before = skyreels.run(pipe, **run)
    with accelerated(pipe, Recipe(NEAR, order="tile")) as handle:
        found = skyreels.run(pipe, **run)
        stats = handle.stats()
    assert torch.equal(skyreels.run(pipe, **run), before)
    assert not torch.allclose(found, before, atol=1e-3)
    reference = skyreels.make(pipeline=FORCING)
    for block in reference.transformer.blocks:
        block.attn1.processor = OfItsLength(block.attn1.processor)
    close(found, skyreels.run(reference, **run))
    assert stats["steps"] == 4
    assert set(stats["step_densities"]) == {0, 2, 3}  # without `scheduler.step` 1 is taken for a part of 0


class OfItsLength:
    """diffusers' own attention under the pattern's token mask for as many frames as a call has."""

    def __init__(self, original):
        self.original = original

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb):
        layout = TokenLayout((hidden_states.shape[1] // 48, 6, 8))
        mask = NEAR.token_mask(layout)
        mask = mask if attention_mask is None else mask & attention_mask
        return self.original(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


def test_the_preset_for_chunks_of_five_frames(skyreels):
    """Of three chunks the first, which has no past, is as dense attention leaves it."""
    pipe, grid = skyreels.make(pipeline=FORCING), (15, 6, 8)
    run = {"grid": grid, "steps": 1, "causal_block_size": 5, "base_num_frames": 57, "prompt": None}
    dense, recipe = skyreels.run(pipe, **run), presets("skyreels-v2")["skyreels-v2-chunk-growth"]
    with accelerated(pipe, recipe.name) as handle:
        found, density = skyreels.run(pipe, **run), handle.run_density
    with accelerated(pipe, replace(recipe, backend="reference")):
        close(found, skyreels.run(pipe, **run))
    assert density < ChunkCausal(5).density(TokenLayout(grid))
    close(found[:, :, :5], dense[:, :, :5])
    assert not torch.allclose(found[:, :, 5:], dense[:, :, 5:], atol=1e-3)


def test_it_takes_the_weights_of_wan(families):
    """And predicts the same as Wan where all frames have one timestep."""
    import diffusers

    wan = pipelines.load("tiny-wan").transformer
    names = set(diffusers.SkyReelsV2Transformer3DModel.__init__.__wrapped__.__code__.co_varnames)
    config = {key: value for key, value in wan.config.items() if key in names and key != "self"}
    transformer = diffusers.SkyReelsV2Transformer3DModel(**config).eval()
    transformer.load_state_dict(wan.state_dict())
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, wan.config.in_channels, 3, 12, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, wan.config.text_dim, generator=generator),
        "timestep": torch.tensor([500.0]),
    }
    with accelerated(wan, NEAR), accelerated(transformer, NEAR):
        close(predicted(transformer, **given), predicted(wan, **given))


def test_plan_and_summary(skyreels):
    answer = plan(NEAR, family="skyreels-v2", size=(128, 64), frames=9, steps=4)
    assert (answer.grid, answer.tokens) == ((3, 4, 8), 96)
    skyreels.pipe.transformer._set_ar_attention(3)
    enable(skyreels.pipe, Recipe(NEAR, dense_layers=1))
    skyreels.run(skyreels.pipe, grid=GRID)
    rows = summary(skyreels.pipe).rows
    assert rows[0]["density"] == pytest.approx(0.75)
    assert "chunk-causal, as the model itself" in rows[0]["note"]
    assert rows[1]["density"] == pytest.approx(ChunkCausal(3, NEAR).density(LAYOUT))
