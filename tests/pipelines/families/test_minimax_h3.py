"""MiniMax H3: the masked dense transformer's output on sequences packed as diffusers packs them."""

from types import SimpleNamespace

import pytest
import torch
from dense_masks import close, mask_layers
from diffusers.modular_pipelines.minimax_h3.before_denoise import (
    MiniMaxH3PrepareLayoutStep,
    MiniMaxH3Ref2VAPrepareLayoutStep,
    MiniMaxH3SetTimestepsStep,
)
from pattern_cases import VIDEO

from dit_accel import TokenLayout
from dit_accel.patterns import ByNoise, Dense, Neighborhood
from dit_accel.pipelines import family_named, family_of
from dit_accel.planning.model_config import published
from dit_accel.planning.plan import plan
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable
from dit_accel.summary import summary

FAMILY = family_named("minimax-h3")
GRID, NEAR = (7, 6, 8), Neighborhood((3, 3, 3))
SIZE = {"num_latent_frames": 7, "latent_height": 12, "latent_width": 16, "num_audio_latents": 4}
SIZE |= {"patch_size": (1, 2, 2), "audio_channels": 2, "audio_tag": 2, "video_tag": 0}
TEXT = torch.tensor([1, 0, 0, 1, 1])  # two rows of what the text encoder saw of a given picture
NAMES = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")


def keyframes(*anchors):
    """Text, keyframes, sound, video."""
    return MiniMaxH3PrepareLayoutStep.build_packed_sequence(TEXT, **SIZE, keyframe_anchors=anchors)


def references():
    """Text, a picture, a video of another size behind its sound, a sound; then sound and video."""
    kinds = [("image", False), ("video", True), ("audio", True)]
    given = [SimpleNamespace(kind=kind, has_audio=sound) for kind, sound in kinds]
    pictures, sounds = [torch.zeros(1, 2, 1, 4, 6), torch.zeros(1, 2, 2, 6, 4)], [torch.zeros(6, 4)] * 2
    return MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(
        TEXT, given, pictures, sounds, **SIZE
    )


PACKED = {
    "text alone": (keyframes, 5 + 8),
    "keyframes": (lambda: keyframes("first", "last"), 5 + 2 * 48 + 8),
    "references": (references, 5 + 6 + 6 + 12 + 6 + 8),
}


def inputs_of(packed, batch=1) -> dict:
    """Random rows for a sequence, given ones at another timestep."""
    *layout, pictures, sounds = packed
    given = dict(zip(NAMES, layout, strict=True))
    times, indices = MiniMaxH3SetTimestepsStep.build_row_timesteps(
        given["video_indices"], given["audio_indices"], pictures, sounds, len(TEXT), 0.4, 0.7, 0.999, 1.0
    )
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": ("video", 8), "audio_hidden_states": ("audio", 4)}
    shapes["encoder_hidden_states"] = ("text", 16)
    rows = {
        name: torch.randn(batch, len(given[f"{kind}_indices"]), width, generator=generator)
        for name, (kind, width) in shapes.items()
    }
    return given | rows | {"timestep": times, "timestep_indices": indices}


@pytest.mark.parametrize("order", ["raster", "hilbert"])
@pytest.mark.parametrize(("packed", "before"), PACKED.values(), ids=PACKED)
def test_sequences(minimaxh3, masked, packed, before, order):
    """Of video and sound, in both forms of output; what stands before the video is attended densely."""
    inputs, reference = inputs_of(packed(), batch=2), minimaxh3.make().transformer
    layout = TokenLayout(GRID, before, text_first=True)
    assert FAMILY.layout(reference, inputs, {}) == layout
    mask_layers(reference, masked, NEAR, layout)
    transformer = minimaxh3.pipe.transformer
    with torch.no_grad():
        stock, expected = transformer(**inputs), reference(**inputs)
        with accelerated(minimaxh3.pipe, Recipe(NEAR, order=order, block_size=(16, 16))):
            found = transformer(**inputs)
            assert f"grid 7 x 6 x 8 tokens + {before} text, sound and given" in str(summary(minimaxh3.pipe))
            assert all(map(torch.equal, transformer(**inputs, return_dict=False), found.values()))
        assert all(map(torch.equal, transformer(**inputs).values(), stock.values()))
    for name in ("sample", "audio_sample"):
        close(found[name], expected[name])
        assert not torch.allclose(found[name], stock[name], atol=1e-3)


@pytest.mark.parametrize("pattern", VIDEO.values(), ids=VIDEO)
def test_patterns(minimaxh3, masked, pattern):
    pipe, inputs = minimaxh3.make(), minimaxh3.inputs(minimaxh3.pipe)
    mask_layers(pipe.transformer, masked, pattern, TokenLayout((3, 6, 8), 7, text_first=True))
    enable(minimaxh3.pipe, Recipe(pattern, order="hilbert", block_size=(16, 16)))
    with torch.no_grad():
        close(minimaxh3.pipe.transformer(**inputs)[0], pipe.transformer(**inputs)[0])


def shuffled(inputs):
    inputs["position_ids"] = inputs["position_ids"].flip(0)


def without_sound_between(inputs):
    """Keyframes, then at once the video: their frames do not follow each other in time."""
    keep = torch.ones(len(inputs["position_ids"]), dtype=torch.bool)
    keep[inputs["audio_indices"]] = False
    place = keep.cumsum(0) - 1
    for name in ("position_ids", "token_tags", "timestep_indices"):
        inputs[name] = inputs[name][keep]
    inputs["video_indices"] = place[inputs["video_indices"]]
    inputs["audio_indices"] = inputs["audio_indices"][:0]
    inputs["audio_hidden_states"] = inputs["audio_hidden_states"][:, :0]


@pytest.mark.parametrize("change", [shuffled, without_sound_between])
def test_other_sequences_are_refused(minimaxh3, change):
    inputs = inputs_of(keyframes("first"))
    change(inputs)
    enable(minimaxh3.pipe, NEAR)
    with pytest.raises(ValueError, match=r"are not one full grid of frames, rows and columns.*disable"):
        minimaxh3.pipe.transformer(**inputs)


def test_noise_levels_of_a_bare_transformer(minimaxh3):
    """Its timesteps rise from 0, pure noise, to 1; those of sound and of given rows say nothing."""
    inputs = inputs_of(keyframes("first"))
    with accelerated(minimaxh3.pipe.transformer, ByNoise({0.5: Dense(), 0: NEAR})) as handle, torch.no_grad():
        for step, timestep in enumerate((0.1, 0.4, 0.6)):
            times = torch.tensor([timestep, 0.7, 0.999, 1.0])
            minimaxh3.pipe.transformer(**inputs | {"timestep": times})
            assert handle.step == step
            assert handle.steps.noise_level(FAMILY.pure_noise, FAMILY.clean) == pytest.approx(1 - timestep)
        first, second, third = handle.latest.step_densities.values()
        assert first == second == 1 > third


def test_the_published_model():
    model = published("minimax-h3")
    transformer = model.transformer()
    grid = model.grid(transformer, (124, 768, 1344))
    assert (grid, family_of(transformer)) == ((37, 24, 42), FAMILY)
    sound = 2 * round(124 / 24 * 40)
    assert model.layout(grid) == TokenLayout(grid, 512 + sound, text_first=True)
    with pytest.raises(ValueError, match=r"must be a multiple of 17 plus 5 .*got 120; try 107 or 124"):
        model.grid(transformer, (120, 768, 1344))
    with pytest.raises(ValueError, match=r"got 1; try 5$"):
        model.grid(transformer, (1, 768, 1344))


def test_example_inputs_are_those_of_a_call(minimaxh3):
    transformer = minimaxh3.pipe.transformer
    example = FAMILY.example_inputs(transformer.config, (2, 3, 4), 6, torch.zeros)
    assert FAMILY.layout(transformer, example, {}) == FAMILY.planned_layout((2, 3, 4), 6)
    assert example.keys() == minimaxh3.inputs(minimaxh3.pipe).keys() - {"return_dict"}
    with torch.no_grad():
        assert transformer(**example).sample.shape == example["hidden_states"].shape


def test_plan():
    answer = plan(NEAR, family="minimax-h3", size=(128, 96), frames=22, steps=4)
    assert (answer.grid, answer.heads, answer.head_dim) == ((7, 3, 4), 56, 128)
