"""HunyuanVideo 1.5 against diffusers' own attention under dense masks, and what it saves in memory."""

import pytest
import torch
from pattern_cases import VIDEO
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_accel import TokenLayout
from dit_accel.patterns import Dense, Neighborhood
from dit_accel.pipelines import family_named, family_of
from dit_accel.planning.model_config import published
from dit_accel.recipe.recipe import Recipe, presets
from dit_accel.runtime.switching import accelerated, enable

FAMILY = family_named("hunyuan-video-1.5")
GRID, NEAR = (3, 6, 8), Neighborhood((3, 3, 3))
CURVE = Recipe(NEAR, order="hilbert")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def mask_layers(transformer, masked, pattern, grid, text_len, layers=None):
    modules = FAMILY.layers(transformer)
    masked(modules, dict.fromkeys(layers or modules, pattern.token_mask(TokenLayout(grid, text_len))))


def under_masks(hunyuan15, masked, pattern, grid=GRID, text_len=7, layers=None, make=None, **run):
    """The untouched pipeline's output when diffusers' own attention gets the pattern's token mask too."""
    pipe = hunyuan15.make(**(make or {}))
    mask_layers(pipe.transformer, masked, pattern, grid, text_len + 4, layers)  # of negative prompts
    return hunyuan15.run(pipe, grid=grid, text_len=text_len, **run)


def inputs_of_two(hunyuan15, first: str, second: str, image: str) -> dict:
    """A call of two samples; masks of texts as digits, one row a sample; which samples have an image."""

    def mask(rows: str) -> torch.Tensor:
        return torch.tensor([[int(place) for place in row] for row in rows.split()])

    inputs = hunyuan15.inputs(hunyuan15.pipe)
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator)

    masks = mask(first), mask(second)
    shown = torch.tensor([sample in image for sample in "01"])[:, None, None]
    return {
        "hidden_states": random(*inputs["hidden_states"].shape[1:]),
        "timestep": inputs["timestep"].repeat(2),
        "encoder_hidden_states": random(masks[0].shape[1], 16),
        "encoder_attention_mask": masks[0],
        "encoder_hidden_states_2": random(masks[1].shape[1], 16),
        "encoder_attention_mask_2": masks[1],
        "image_embeds": random(3, 16) * shown,
    }


class TestMatchesMaskedDense:
    @pytest.mark.parametrize("order", ["raster", "tile", "hilbert", "auto"])
    @pytest.mark.parametrize("pattern", VIDEO.values(), ids=VIDEO)
    def test_orders_and_patterns(self, hunyuan15, masked, pattern, order):
        with accelerated(hunyuan15.pipe, Recipe(pattern, order=order, block_size=(16, 16))):
            expected = under_masks(hunyuan15, masked, pattern, batch=2, steps=2)
            close(hunyuan15.run(hunyuan15.pipe, batch=2, steps=2), expected)

    @pytest.mark.parametrize(
        "run",
        [{"batch": 2, "cfg": 3.0}, {"grid": (4, 3, 11)}, {"text_len": 40}, {"num_videos_per_prompt": 1}],
        ids=lambda run: "-".join(f"{k}{v}" for k, v in run.items()).replace(" ", ""),
    )
    def test_runs(self, hunyuan15, masked, run):
        with accelerated(hunyuan15.pipe, CURVE):
            close(hunyuan15.run(hunyuan15.pipe, **run), under_masks(hunyuan15, masked, NEAR, **run))

    @pytest.mark.parametrize("layers", [["blocks.1"], ["blocks.0", "blocks.2"]], ids=str)
    def test_some_layers(self, hunyuan15, masked, layers):
        """Dense layers are accelerated too, in the order of the others."""
        with accelerated(hunyuan15.pipe, Recipe(dict.fromkeys(layers, NEAR), order="hilbert")):
            expected = under_masks(hunyuan15, masked, NEAR, layers=layers, batch=2)
            close(hunyuan15.run(hunyuan15.pipe, batch=2), expected)

    @pytest.mark.parametrize("config", [{"use_meanflow": True}, {"patch_size": 2}], ids=str)
    def test_configurations(self, hunyuan15, masked, config):
        pipe, ref = hunyuan15.make(**config), hunyuan15.make(**config).transformer
        inputs = hunyuan15.inputs(hunyuan15.pipe)
        if "use_meanflow" in config:
            inputs["timestep_r"] = inputs["timestep"] / 2
        size = config.get("patch_size", 1)
        mask_layers(ref, masked, NEAR, (3, 6 // size, 8 // size), 7)
        enable(pipe.transformer, CURVE)
        with torch.no_grad():
            close(pipe.transformer(**inputs)[0], ref(**inputs)[0])


TEXTS = {  # masks of the first and the second text, a row a sample, and the samples with an image
    "prefixes": ("1110 1111", "110 100", ""),
    "no-prefixes": ("0101 0011", "011 101", ""),
    "none-of-one": ("0000 1111", "011 000", ""),
    "nothing": ("0000 0000", "000 000", ""),
    "image": ("0101 1110", "000 110", "01"),
    "image-of-one": ("0101 1110", "000 110", "1"),
}


class TestText:
    """Of three encoders. Padded text is hidden, wherever it stands; an image counts for all samples."""

    @pytest.mark.parametrize("pattern", [NEAR, Dense()], ids=["sparse", "dense"])
    @pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
    def test_matches_masked_dense(self, hunyuan15, masked, text, pattern):
        inputs, ref = inputs_of_two(hunyuan15, *text), hunyuan15.make().transformer
        mask_layers(ref, masked, pattern, GRID, 10)
        enable(hunyuan15.pipe, Recipe(pattern, order="hilbert"))
        with torch.no_grad():
            close(hunyuan15.pipe.transformer(**inputs)[0], ref(**inputs)[0])

    def test_padding_changes_nothing_and_the_rest_does(self, hunyuan15):
        inputs = inputs_of_two(hunyuan15, *TEXTS["no-prefixes"])
        enable(hunyuan15.pipe, CURVE)
        with torch.no_grad():
            expected = hunyuan15.pipe.transformer(**inputs)[0]
            for name in ("encoder_hidden_states", "encoder_hidden_states_2"):
                seen = inputs[name.replace("hidden_states", "attention_mask")][..., None] > 0
                for changed in (seen, ~seen):
                    text = torch.where(changed, inputs[name].flip(-1), inputs[name])
                    actual = hunyuan15.pipe.transformer(**inputs | {name: text})[0]
                    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5) == (changed is not seen)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
    def test_lengths(self, hunyuan15, dtype):
        for text, lengths in (("no-prefixes", [4, 4]), ("none-of-one", [2, 4]), ("image-of-one", [5, 8])):
            inputs = inputs_of_two(hunyuan15, *TEXTS[text])
            for name in ("encoder_attention_mask", "encoder_attention_mask_2"):
                inputs[name] = inputs[name].to(dtype)
            assert FAMILY.text_valid(inputs, {}).tolist() == lengths

    def test_masks_are_read_once_per_run(self, hunyuan15, monkeypatch):
        """Of both branches of guidance."""
        from dit_accel.pipelines.families import hunyuan_video15 as module

        reads, count = [], module._count
        monkeypatch.setattr(module, "_count", lambda mask: reads.append(mask.shape[1]) or count(mask))
        enable(hunyuan15.pipe, CURVE)
        hunyuan15.run(hunyuan15.pipe, steps=4, cfg=2.0)
        assert reads == [1, 3, 5, 3]


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that PyTorch makes, matrices (weights) left out."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = (x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor) and x.ndim > 2)
        self.elements = max(self.elements, *sizes, 0)
        return made


class TestDense:
    def test_is_that_of_diffusers(self, hunyuan15):
        dense = hunyuan15.run(hunyuan15.pipe, batch=2, cfg=3.0)
        with accelerated(hunyuan15.pipe, Dense()):
            close(hunyuan15.run(hunyuan15.pipe, batch=2, cfg=3.0), dense)
        assert torch.equal(hunyuan15.run(hunyuan15.pipe, batch=2, cfg=3.0), dense)

    @pytest.mark.parametrize("recipe", [Recipe(Dense()), CURVE], ids=["dense", "sparse"])
    def test_makes_no_mask_of_all_pairs(self, hunyuan15, recipe):
        def largest() -> int:
            with LargestTensor() as mode:
                hunyuan15.run(hunyuan15.pipe, grid=(6, 14, 14), steps=1)
            return mode.elements

        largest()
        pairs = (6 * 14 * 14 + 7) ** 2
        assert largest() == pairs
        with accelerated(hunyuan15.pipe, recipe):
            hunyuan15.run(hunyuan15.pipe, grid=(6, 14, 14), steps=1)  # masks of the pattern are made
            assert largest() < pairs / 4

    def test_that_mask_at_720p(self):
        model = published("hunyuan-video-1.5")
        layout = model.layout(model.grid(model.transformer(), model.size))
        assert layout == TokenLayout((31, 45, 80), 1000 + 256 + 729)
        assert layout.seq_len**2 / 1e9 == pytest.approx(12.9, abs=0.05)  # a byte a pair

    def test_backend_of_diffusers_is_used(self, hunyuan15, monkeypatch):
        from diffusers.models.transformers import transformer_hunyuan_video15 as module

        asked, dispatch = [], module.dispatch_attention_fn
        monkeypatch.setattr(
            module, "dispatch_attention_fn",
            lambda *qkv, **options: asked.append(options["backend"]) or dispatch(*qkv, **options),
        )  # fmt: skip
        enable(hunyuan15.pipe, Recipe(NEAR, dense_layers=2))
        hunyuan15.pipe.transformer.set_attention_backend("_native_math")
        hunyuan15.run(hunyuan15.pipe, steps=1)
        assert asked == ["_native_math"] * 2


def test_disable_is_bit_identical(hunyuan15):
    dense = hunyuan15.run(hunyuan15.pipe, batch=2, cfg=3.0)
    with accelerated(hunyuan15.pipe, CURVE):
        assert not torch.allclose(hunyuan15.run(hunyuan15.pipe, batch=2, cfg=3.0), dense)
    assert torch.equal(hunyuan15.run(hunyuan15.pipe, batch=2, cfg=3.0), dense)


def test_text_s_own_attention_is_untouched(hunyuan15):
    refiner = hunyuan15.pipe.transformer.context_embedder
    before = [m.processor for m in refiner.modules() if hasattr(m, "processor")]
    enable(hunyuan15.pipe, NEAR)
    assert before
    assert before == [m.processor for m in refiner.modules() if hasattr(m, "processor")]


def test_family_of(hunyuan15):
    assert family_of(hunyuan15.pipe.transformer) is FAMILY
    assert list(FAMILY.layers(hunyuan15.pipe.transformer)) == ["blocks.0", "blocks.1", "blocks.2"]


def test_presets(hunyuan15):
    assert set(presets("hunyuan-video-1.5")) == {
        "hunyuan-video-1.5-radial", "hunyuan-video-1.5-radial-int8", "hunyuan-video-1.5-sta"
    }  # fmt: skip
    for name in presets("hunyuan-video-1.5"):
        enable(hunyuan15.pipe, name)
    with pytest.raises(ValueError, match=r"'hunyuan-video', but this is a hunyuan-video-1\.5 transformer"):
        enable(hunyuan15.pipe, "hunyuan-video-radial")
