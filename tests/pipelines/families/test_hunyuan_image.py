"""HunyuanImage: the masked dense transformer's output, padded text of two encoders, the refiner's latents."""

import pytest
import torch
from dense_masks import close, mask_layers

from dit_accel import TokenLayout
from dit_accel.patterns import Clear
from dit_accel.pipelines import family_named, family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import enable

FAMILY = family_named("hunyuan-image")
CURVE = Recipe(Clear(3), order="hilbert")


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ({"use_meanflow": True}, {"timestep_r": torch.tensor([480.0])}),
        ({"guidance_embeds": True}, {"guidance": torch.tensor([3250.0])}),
        ({"patch_size": (2, 2)}, {}),
    ],
    ids=["meanflow", "guidance", "patches"],
)
def test_configurations(hunyuanimage, masked, config, more):
    pipe, ref = hunyuanimage.make(**config), hunyuanimage.make(**config).transformer
    inputs = hunyuanimage.inputs(hunyuanimage.pipe) | more
    grid = (1, 4, 6) if "patch_size" in config else (1, 8, 12)
    mask_layers(ref, masked, Clear(2), TokenLayout(grid, 7))
    enable(pipe.transformer, Recipe(Clear(2), order="hilbert"))
    with torch.no_grad():
        close(pipe.transformer(**inputs)[0], ref(**inputs)[0])


def test_the_refiner_s_latents_of_frames(hunyuanimage, masked):
    """With one encoder, whose padding must come last, as the transformer does not move it."""
    config = {"patch_size": (1, 1, 1), "rope_axes_dim": (4, 6, 6), "text_embed_2_dim": None}
    pipe, ref = hunyuanimage.make(**config), hunyuanimage.make(**config).transformer
    generator = torch.Generator().manual_seed(1)
    inputs = hunyuanimage.inputs(hunyuanimage.pipe)
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 12, generator=generator),
        "timestep": inputs["timestep"],
        "encoder_hidden_states": torch.randn(1, 7, 16, generator=generator),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
    }
    mask_layers(ref, masked, Clear(3), TokenLayout((2, 8, 12), 7))
    enable(pipe.transformer, CURVE)
    with torch.no_grad():
        close(pipe.transformer(**inputs)[0], ref(**inputs)[0])
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].flip(1)
    with pytest.raises(ValueError, match="must be ones followed by zeros"):
        pipe.transformer(**inputs)


def test_padding_changes_nothing_and_the_rest_does(hunyuanimage):
    inputs = hunyuanimage.inputs(hunyuanimage.pipe)
    for end in ("", "_2"):  # the text's refiner attends to its first token, padded or not
        inputs[f"encoder_attention_mask{end}"] = inputs[f"encoder_attention_mask{end}"].flip(1)
    enable(hunyuanimage.pipe, CURVE)
    with torch.no_grad():
        expected = hunyuanimage.pipe.transformer(**inputs)[0]
        for end in ("", "_2"):
            text, seen = inputs[f"encoder_hidden_states{end}"], inputs[f"encoder_attention_mask{end}"] > 0
            for changed in (seen, ~seen):
                other = torch.where(changed[..., None], text.flip(-1), text)
                actual = hunyuanimage.pipe.transformer(**inputs | {f"encoder_hidden_states{end}": other})[0]
                assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5) == (changed is not seen)


def test_family_of(hunyuanimage):
    assert family_of(hunyuanimage.pipe.transformer) is FAMILY
    names = ["double.0", "double.1", "single.0", "single.1"]
    assert list(FAMILY.layers(hunyuanimage.pipe.transformer)) == names
