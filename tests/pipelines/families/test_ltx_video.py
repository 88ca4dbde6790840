"""LTX-Video against diffusers' own attention under dense masks, conditions beside the video included."""

import json

import pytest
import torch
from diffusers import LTXConditionPipeline

from dit_accel import TokenLayout
from dit_accel.patterns import Neighborhood, Radial
from dit_accel.pipelines import family_named, family_of
from dit_accel.pipelines.families.ltx_video import grid_of_coordinates
from dit_accel.planning.plan import plan
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable
from dit_accel.summary import summary

FAMILY = family_named("ltx-video")
GRID, NEAR = (3, 6, 8), Neighborhood((3, 3, 3))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def under_masks(ltx, masked, pattern, layout):
    """A transformer with diffusers' own attention, which gets the pattern's token mask."""
    transformer = ltx.make().transformer
    masked(FAMILY.layers(transformer), dict.fromkeys(FAMILY.layers(transformer), pattern.token_mask(layout)))
    return transformer


def coordinates(grid, batch=1, conditions=((4, (1, 6, 8)),), rate=25.0):
    """As the condition pipeline makes them: of each condition from a frame on, then of the video."""
    parts = []
    for at, size in [*conditions, (0, grid)]:
        ids = LTXConditionPipeline._prepare_video_ids(batch, *size)
        parts.append(LTXConditionPipeline._scale_video_ids(ids, frame_index=8 * at))
    coords = torch.cat(parts, dim=2).float()
    coords[:, 0] /= rate
    return coords


@pytest.mark.parametrize("pattern", [NEAR, Radial(0.2, block_size=16)], ids=["near", "radial"])
@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_matches_masked_dense(ltx, masked, pattern, order):
    """Of two samples, text padded to different lengths, the halves of guidance in one batch."""
    inputs = ltx.inputs(ltx.pipe) | {"return_dict": False}
    half = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    inputs |= {name: torch.cat([x, x.flip(1) if x.ndim == 3 else x]) for name, x in half.items()}
    inputs["encoder_attention_mask"][1, 2:] = 0
    reference = under_masks(ltx, masked, pattern, TokenLayout(GRID))
    enable(ltx.pipe, Recipe(pattern, order=order, block_size=(16, 16)))
    with torch.no_grad():
        close(ltx.pipe.transformer(**inputs)[0], reference(**inputs)[0])


@pytest.mark.parametrize("per_token", [False, True], ids=["one-timestep", "timestep-per-token"])
def test_conditions_are_attended_densely(ltx, masked, per_token):
    """They stand in front of the video and stay there."""
    count, generator = 48 + 12, torch.Generator().manual_seed(1)
    inputs = ltx.inputs(ltx.pipe)
    coords = coordinates(GRID, conditions=[(4, (1, 6, 8)), (9, (1, 3, 4))])
    inputs |= {"num_frames": None, "height": None, "width": None, "video_coords": coords}
    inputs["hidden_states"] = torch.randn(1, count + 144, 4, generator=generator)
    if per_token:
        inputs["timestep"] = torch.linspace(0, 900, count + 144)[None]
    reference = under_masks(ltx, masked, NEAR, TokenLayout(GRID, text_len=count, text_first=True))
    enable(ltx.pipe, Recipe(NEAR, order="hilbert"))
    with torch.no_grad():
        found, expected = ltx.pipe.transformer(**inputs)[0], reference(**inputs)[0]
    close(found, expected)
    assert f"grid 3 x 6 x 8 tokens + {count} condition" in str(summary(ltx.pipe))


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 4, 5), (3, 1, 4), (4, 5, 1), (9, 6, 8)])
@pytest.mark.parametrize("conditions", [[], [(4, (1, 6, 8))], [(3, (2, 6, 8)), (11, (1, 2, 5))]], ids=len)
def test_reads_the_grid_of_coordinates(grid, conditions):
    extra = sum(f * h * w for _, (f, h, w) in conditions)
    coords = coordinates(grid, 2, conditions)
    assert grid_of_coordinates(coords) == (grid, extra)
    assert grid_of_coordinates(torch.stack([coords, coords + 1], -1)) == (grid, extra)


def test_refuses_what_is_no_grid(ltx):
    coords = coordinates(GRID, conditions=[])
    with pytest.raises(ValueError, match=r"do not end in one full grid.*`dit_accel.disable\(pipe\)`"):
        grid_of_coordinates(coords[:, :, torch.randperm(144, generator=torch.Generator().manual_seed(0))])
    enable(ltx.pipe, NEAR)
    with pytest.raises(ValueError, match=r"has 144 tokens, but its frames, rows and columns are \(3, 6, 9\)"):
        ltx.pipe.transformer(**ltx.inputs(ltx.pipe) | {"width": 9})


def test_cross_attention_is_untouched(ltx):
    before = [block.attn2.processor for block in ltx.pipe.transformer.transformer_blocks]
    with accelerated(ltx.pipe, NEAR):
        assert [block.attn2.processor for block in ltx.pipe.transformer.transformer_blocks] == before


def test_guidance_is_in_one_batch(ltx):
    assert family_of(ltx.pipe.transformer) is FAMILY
    latents = torch.randn(1, 144, 4)
    ltx.pipe._guidance_scale = 3.0
    assert FAMILY.conditional(ltx.pipe, {"hidden_states": latents.expand(2, -1, -1)}) == slice(1, 2)
    ltx.pipe._guidance_scale = 1.0
    assert FAMILY.conditional(ltx.pipe, {"hidden_states": latents.expand(2, -1, -1)}) == slice(0, 2)


def test_plans_of_folders(ltx, tmp_path):
    ltx.pipe.save_pretrained(tmp_path)
    vae = {"_class_name": "AutoencoderKLLTXVideo", "patch_size": 4, "patch_size_t": 1}
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text(
        json.dumps(vae | {"spatio_temporal_scaling": [True, True, True, False]})
    )
    answer = plan(NEAR, model=str(tmp_path), size=(256, 192), frames=17)
    assert (answer.grid, answer.tokens) == (GRID, 144)
    with pytest.raises(ValueError, match="`frames` must be a multiple of 8 plus 1"):
        plan(NEAR, model=str(tmp_path), size=(256, 192), frames=13)
