"""HunyuanImage: the masked dense transformer's output, padded text of two encoders, the refiner's latents."""

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import Clear, Dense, Neighborhood
from dit_accel.pipelines import family_named, family_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, enable

FAMILY = family_named("hunyuan-image")
CURVE = Recipe(Clear(3), order="hilbert")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def mask_layers(transformer, masked, pattern, layers=None, grid=(1, 8, 12), text_len=7):
    modules = FAMILY.layers(transformer)
    masked(modules, dict.fromkeys(layers or modules, pattern.token_mask(TokenLayout(grid, text_len))))


def under_masks(hunyuanimage, masked, pattern, layers=None, grid=(8, 12), text_len=7, **run):
    """The untouched pipeline's output when diffusers' own attention gets the pattern's token mask too."""
    pipe = hunyuanimage.make()
    mask_layers(pipe.transformer, masked, pattern, layers, (1, *grid), text_len)
    return hunyuanimage.run(pipe, grid=grid, text_len=text_len, **run)


class TestMatchesMaskedDense:
    @pytest.mark.parametrize("order", ["raster", "tile", "hilbert", "auto"])
    @pytest.mark.parametrize("pattern", [Clear(3), Neighborhood((3, 5))], ids=["clear", "neighborhood"])
    def test_orders_and_patterns(self, hunyuanimage, masked, pattern, order):
        with accelerated(hunyuanimage.pipe, Recipe(pattern, order=order, block_size=(16, 16))):
            expected = under_masks(hunyuanimage, masked, pattern, batch=2, steps=2)
            close(hunyuanimage.run(hunyuanimage.pipe, batch=2, steps=2), expected)

    @pytest.mark.parametrize(
        "run",
        [{"batch": 2, "cfg": 3.0}, {"grid": (5, 13)}, {"text_len": 40, "steps": 1}],
        ids=lambda run: "-".join(f"{k}{v}" for k, v in run.items()).replace(" ", ""),
    )
    def test_runs(self, hunyuanimage, masked, run):
        with accelerated(hunyuanimage.pipe, CURVE):
            expected = under_masks(hunyuanimage, masked, Clear(3), **run)
            close(hunyuanimage.run(hunyuanimage.pipe, **run), expected)

    def test_some_layers(self, hunyuanimage, masked):
        layers = ["double.1", "single.0"]
        with accelerated(hunyuanimage.pipe, Recipe({"1-2": Clear(3)}, order="hilbert")):
            close(hunyuanimage.run(hunyuanimage.pipe), under_masks(hunyuanimage, masked, Clear(3), layers))

    @pytest.mark.parametrize(
        ("config", "more"),
        [
            ({"use_meanflow": True}, {"timestep_r": torch.tensor([480.0])}),
            ({"guidance_embeds": True}, {"guidance": torch.tensor([3250.0])}),
            ({"patch_size": (2, 2)}, {}),
        ],
        ids=["meanflow", "guidance", "patches"],
    )
    def test_configurations(self, hunyuanimage, masked, config, more):
        pipe, ref = hunyuanimage.make(**config), hunyuanimage.make(**config).transformer
        inputs = hunyuanimage.inputs(hunyuanimage.pipe) | more
        mask_layers(ref, masked, Clear(2), grid=(1, 4, 6) if "patch_size" in config else (1, 8, 12))
        enable(pipe.transformer, Recipe(Clear(2), order="hilbert"))
        with torch.no_grad():
            close(pipe.transformer(**inputs)[0], ref(**inputs)[0])

    def test_the_refiner_s_latents_of_frames(self, hunyuanimage, masked):
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
        mask_layers(ref, masked, Clear(3), grid=(2, 8, 12))
        enable(pipe.transformer, CURVE)
        with torch.no_grad():
            close(pipe.transformer(**inputs)[0], ref(**inputs)[0])
        inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].flip(1)
        with pytest.raises(ValueError, match="must be ones followed by zeros"):
            pipe.transformer(**inputs)


class TestDense:
    def test_is_that_of_diffusers_bit_by_bit(self, hunyuanimage):
        dense = hunyuanimage.run(hunyuanimage.pipe, batch=2, cfg=3.0)
        with accelerated(hunyuanimage.pipe, Dense()):
            assert torch.equal(hunyuanimage.run(hunyuanimage.pipe, batch=2, cfg=3.0), dense)

    def test_disable_is_bit_identical(self, hunyuanimage):
        dense = hunyuanimage.run(hunyuanimage.pipe, batch=2, cfg=3.0)
        with accelerated(hunyuanimage.pipe, CURVE):
            changed = hunyuanimage.run(hunyuanimage.pipe, batch=2, cfg=3.0)
        assert not torch.allclose(changed, dense, atol=1e-3)
        assert torch.equal(hunyuanimage.run(hunyuanimage.pipe, batch=2, cfg=3.0), dense)

    def test_a_pattern_that_covers_all(self, hunyuanimage):
        dense = hunyuanimage.run(hunyuanimage.pipe, batch=2)
        with accelerated(hunyuanimage.pipe, Recipe(Clear(20), order="hilbert")):
            close(hunyuanimage.run(hunyuanimage.pipe, batch=2), dense)


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
