import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from pattern_cases import VIDEO

from dit_accel import TokenLayout
from dit_accel.patterns import Dense, Neighborhood, SlidingTile
from dit_accel.pipelines import family_named, family_of
from dit_accel.pipelines.families.hunyuan_video import valid_lengths
from dit_accel.recipe.recipe import Recipe, presets
from dit_accel.runtime.switching import accelerated, disable, enable

FAMILY = family_named("hunyuan-video")
NEAR = Neighborhood((3, 3, 3))
CURVE = Recipe(NEAR, order="hilbert")
ORDERS = pytest.mark.parametrize("order", ["raster", "tile", "hilbert", "auto"])
FIRST_FRAME = {"image_condition_type": "token_replace"}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def under_masks(
    hunyuan, masked, pattern, grid=(3, 6, 8), text_len=7, layers=None, make=None,
    prepare=lambda pipe: None, **run,
):  # fmt: skip
    """The untouched pipeline's output when diffusers' own attention gets the pattern's token mask too."""
    pipe = hunyuan.make(**(make or {}))
    prepare(pipe)
    longest = text_len + 4  # of negative prompts
    modules = FAMILY.layers(pipe.transformer)
    masked(modules, dict.fromkeys(layers or modules, pattern.token_mask(TokenLayout(grid, longest))))
    return hunyuan.run(pipe, grid=grid, text_len=text_len, **run)


def compare_calls(hunyuan, masked, change, recipe=CURVE, grid=(3, 6, 8), **config):
    """One call of a bare transformer with `change`d inputs, against the untouched one under masks."""
    pipe, ref = hunyuan.make(**config), hunyuan.make(**config).transformer
    inputs = hunyuan.inputs(hunyuan.pipe) | change
    modules = FAMILY.layers(ref)
    length = inputs["encoder_hidden_states"].shape[1]
    masked(modules, dict.fromkeys(modules, recipe.attention.token_mask(TokenLayout(grid, length))))
    enable(pipe.transformer, recipe)
    with torch.no_grad():
        close(pipe.transformer(**inputs)[0], ref(**inputs)[0])


class TestMatchesMaskedDense:
    @ORDERS
    @pytest.mark.parametrize("pattern", VIDEO.values(), ids=VIDEO)
    def test_orders_and_patterns(self, hunyuan, masked, pattern, order):
        with accelerated(hunyuan.pipe, Recipe(pattern, order=order, block_size=(16, 16))):
            expected = under_masks(hunyuan, masked, pattern, batch=2, steps=2)
            close(hunyuan.run(hunyuan.pipe, batch=2, steps=2), expected)

    @pytest.mark.parametrize(
        "run",
        [
            {"batch": 3, "cfg": 3.0},
            {"grid": (4, 3, 11), "batch": 2},
            {"text_len": 3},
            {"text_len": 40, "batch": 2},
        ],
        ids=lambda run: "-".join(f"{k}{v}" for k, v in run.items()).replace(" ", ""),
    )
    def test_runs(self, hunyuan, masked, run):
        with accelerated(hunyuan.pipe, CURVE):
            close(hunyuan.run(hunyuan.pipe, **run), under_masks(hunyuan, masked, NEAR, **run))

    @pytest.mark.parametrize("layers", [["double.1", "single.0"], ["double.0"], ["single.1"]], ids=str)
    def test_some_layers(self, hunyuan, masked, layers):
        """Dense layers get the mask of padded text in the order of the others."""
        recipe = Recipe(dict.fromkeys(layers, NEAR), order="hilbert")
        with accelerated(hunyuan.pipe, recipe):
            expected = under_masks(hunyuan, masked, NEAR, layers=layers, batch=2)
            close(hunyuan.run(hunyuan.pipe, batch=2), expected)

    def test_patterns_by_head(self, hunyuan, masked):
        ref = hunyuan.make()
        masks = torch.stack([p.token_mask(TokenLayout((3, 6, 8), 7)) for p in (NEAR, Dense())])
        masked(FAMILY.layers(ref.transformer), dict.fromkeys(FAMILY.layers(ref.transformer), masks))
        with accelerated(hunyuan.pipe, Recipe({"heads.0": NEAR}, order="hilbert")):
            close(hunyuan.run(hunyuan.pipe, batch=2), hunyuan.run(ref, batch=2))

    @pytest.mark.parametrize("config", [{"guidance_embeds": False}, {"qk_norm": None}], ids=str)
    def test_configurations(self, hunyuan, masked, config):
        pipe = hunyuan.make(**config)
        with accelerated(pipe, CURVE):
            close(hunyuan.run(pipe, cfg=3.0), under_masks(hunyuan, masked, NEAR, make=config, cfg=3.0))

    def test_patches_over_frames(self, hunyuan, masked):
        video = {"hidden_states": torch.randn(1, 4, 6, 12, 16, generator=torch.Generator().manual_seed(0))}
        compare_calls(hunyuan, masked, video, patch_size_t=2)

    def test_image_beside_the_latents(self, hunyuan, masked):
        video = {"hidden_states": torch.randn(1, 9, 3, 12, 16, generator=torch.Generator().manual_seed(0))}
        compare_calls(hunyuan, masked, video, in_channels=9, image_condition_type="latent_concat")

    def test_odd_latents_are_cropped_as_the_model_does(self, hunyuan, masked):
        video = {"hidden_states": torch.randn(1, 4, 3, 13, 17, generator=torch.Generator().manual_seed(0))}
        compare_calls(hunyuan, masked, video)


class TestFirstFrameReplaced:
    """`"token_replace"`: blocks modulate the first H * W tokens in another way."""

    @ORDERS
    def test_matches_masked_dense(self, hunyuan, masked, order):
        pipe = hunyuan.make(**FIRST_FRAME)
        expected = under_masks(hunyuan, masked, NEAR, make=FIRST_FRAME, batch=2, steps=2)
        with accelerated(pipe, Recipe(NEAR, order=order, block_size=(16, 16))):
            close(hunyuan.run(pipe, batch=2, steps=2), expected)

    def test_stays_first_in_every_pattern_s_order(self, hunyuan):
        pipe = hunyuan.make(**FIRST_FRAME)
        recipe = Recipe({"double": SlidingTile((1, 3, 1), (2, 2, 4)), "single": NEAR}, order="tile")
        handle = enable(pipe, recipe)
        hunyuan.run(pipe, steps=1)
        geometry = handle.bindings["transformer"].geometry
        assert sorted(geometry.permutation[:48].tolist()) == list(range(48))
        assert geometry.permutation[:48].tolist() != list(range(48))
        assert all(torch.equal(a.mask.order[:144], geometry.permutation) for a in geometry.attentions)


class TestPaddedText:
    def test_changes_nothing(self, hunyuan):
        enable(hunyuan.pipe, CURVE)
        inputs = hunyuan.inputs(hunyuan.pipe)
        text = inputs["encoder_hidden_states"]
        with torch.no_grad():
            expected = hunyuan.pipe.transformer(**inputs)[0]
            other = torch.where(inputs["encoder_attention_mask"][..., None] > 0, text, text + 9)
            close(hunyuan.pipe.transformer(**inputs | {"encoder_hidden_states": other})[0], expected)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
    def test_lengths(self, dtype):
        mask = torch.arange(300) < torch.tensor([[300], [0], [257]])
        assert valid_lengths(mask.to(dtype)).tolist() == [300, 0, 257]

    @pytest.mark.parametrize("row", [[0, 1, 1], [1, 0, 1], [1, 0.5, 0.5]], ids=str)
    def test_padding_elsewhere_is_refused(self, hunyuan, row):
        inputs = hunyuan.inputs(hunyuan.pipe)
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :3]
        inputs["encoder_attention_mask"] = torch.tensor([row])
        enable(hunyuan.pipe.transformer, CURVE)
        with pytest.raises(ValueError, match=r"ones followed by zeros.*padding_side=\"right\""):
            hunyuan.pipe.transformer(**inputs)
        disable(hunyuan.pipe)
        hunyuan.pipe.transformer(**inputs)

    def test_masks_are_read_once_per_run(self, hunyuan, monkeypatch):
        from dit_accel.pipelines.families import hunyuan_video as module

        reads = []
        monkeypatch.setattr(module, "valid_lengths", lambda mask: reads.append(mask) or valid_lengths(mask))
        enable(hunyuan.pipe, CURVE)
        hunyuan.run(hunyuan.pipe, steps=4, cfg=2.0)
        assert [mask.shape[1] for mask in reads] == [7, 11]
        reads[0][:, 3:] = 0  # the same tensor, changed
        inputs = hunyuan.inputs(hunyuan.pipe)
        hunyuan.pipe.transformer(**inputs | {"encoder_attention_mask": reads[0]})
        assert len(reads) == 4


def test_disable_is_bit_identical(hunyuan):
    dense = hunyuan.run(hunyuan.pipe, batch=2, cfg=3.0)
    with accelerated(hunyuan.pipe, CURVE):
        assert not torch.allclose(hunyuan.run(hunyuan.pipe, batch=2, cfg=3.0), dense)
    assert torch.equal(hunyuan.run(hunyuan.pipe, batch=2, cfg=3.0), dense)


def test_gradient_checkpointing_in_dense_use(hunyuan):
    inputs = hunyuan.inputs(hunyuan.pipe)

    def gradient():
        hunyuan.pipe.transformer.zero_grad()
        hunyuan.pipe.transformer(**inputs)[0].square().sum().backward()
        return hunyuan.pipe.transformer.transformer_blocks[0].attn.to_q.weight.grad.clone()

    expected = gradient()
    hunyuan.pipe.transformer.enable_gradient_checkpointing()
    with accelerated(hunyuan.pipe, Dense()):
        close(gradient(), expected)
    close(gradient(), expected)


def test_text_s_own_attention_is_untouched(hunyuan):
    refiner = hunyuan.pipe.transformer.context_embedder
    before = [m.processor for m in refiner.modules() if hasattr(m, "processor")]
    enable(hunyuan.pipe, NEAR)
    assert before
    assert before == [m.processor for m in refiner.modules() if hasattr(m, "processor")]


def test_family_of(hunyuan):
    from diffusers import HunyuanVideoFramepackTransformer3DModel as Framepack

    assert family_of(hunyuan.pipe.transformer) is FAMILY
    assert list(FAMILY.layers(hunyuan.pipe.transformer)) == ["double.0", "double.1", "single.0", "single.1"]
    assert not issubclass(Framepack, HunyuanVideoTransformer3DModel)
    with torch.device("meta"), pytest.raises(TypeError, match=r"Framepack.* is not supported"):
        family_of(Framepack(num_layers=1, num_single_layers=1))


def test_presets(hunyuan):
    names = {name for name in presets("hunyuan-video") if not name.startswith("tiny-")}
    assert names == {
        "hunyuan-video-neighborhood", "hunyuan-video-radial", "hunyuan-video-rectified",
        "hunyuan-video-sparge", "hunyuan-video-sparge-int8", "hunyuan-video-sta", "hunyuan-video-svg",
        "hunyuan-video-svg2", "hunyuan-video-xattention",
    }  # fmt: skip
    enable(hunyuan.pipe, "hunyuan-video-radial")
    with pytest.raises(ValueError, match="for the family 'wan', but this is a hunyuan-video transformer"):
        enable(hunyuan.pipe, "wan-radial")
