"""Qwen-Image, its Edit and Layered: the masked dense transformer's output, padded text, given images."""

import pytest
import torch
from dense_masks import close, mask_layers

from dit_accel import TokenLayout
from dit_accel.errors import UnavailableError
from dit_accel.highres import generate
from dit_accel.patterns import Clear, Neighborhood
from dit_accel.pipelines import family_named, family_of
from dit_accel.pipelines.families.qwen_image import shapes_of
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import disable, enable
from dit_accel.summary import summary

FAMILY = family_named("qwen-image")
CURVE = Recipe(Clear(3), order="hilbert")


def layout(grid=(1, 8, 12), text_len=7, anchor=None):
    return TokenLayout(grid, text_len=text_len, text_first=True, anchor=anchor)


def test_controlnet_residuals(qwen, masked):
    inputs, ref = qwen.inputs(qwen.pipe), qwen.make().transformer
    generator = torch.Generator().manual_seed(0)
    inputs["controlnet_block_samples"] = [torch.randn(1, 96, 32, generator=generator) for _ in range(2)]
    mask_layers(ref, masked, Clear(3), layout())
    enable(qwen.pipe, CURVE)
    with torch.no_grad():
        close(qwen.pipe.transformer(**inputs)[0], ref(**inputs)[0])


class TestText:
    def test_padding_changes_nothing_and_the_rest_does(self, qwen):
        inputs = qwen.inputs(qwen.pipe)
        seen = inputs["encoder_hidden_states_mask"][..., None] > 0
        enable(qwen.pipe, CURVE)
        with torch.no_grad():
            expected = qwen.pipe.transformer(**inputs)[0]
            for changed in (seen, ~seen):
                text = inputs["encoder_hidden_states"]
                text = torch.where(changed, text.flip(-1), text)
                actual = qwen.pipe.transformer(**inputs | {"encoder_hidden_states": text})[0]
                assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5) == (changed is not seen)

    def test_without_a_mask_all_of_it_is_seen(self, qwen, masked):
        inputs = qwen.inputs(qwen.pipe) | {"encoder_hidden_states_mask": None}
        ref = qwen.make().transformer
        mask_layers(ref, masked, Clear(3), layout())
        enable(qwen.pipe, CURVE)
        with torch.no_grad():
            close(qwen.pipe.transformer(**inputs)[0], ref(**inputs)[0])

    def test_padding_must_come_last(self, qwen):
        inputs = qwen.inputs(qwen.pipe)
        inputs["encoder_hidden_states_mask"] = inputs["encoder_hidden_states_mask"].flip(1)
        enable(qwen.pipe, CURVE)
        with pytest.raises(ValueError, match=r"`encoder_hidden_states_mask` must be ones followed by zeros"):
            qwen.pipe.transformer(**inputs)

    def test_processors_that_ignore_the_mask_are_refused(self, qwen, monkeypatch):
        from diffusers.models.transformers import transformer_qwenimage as module

        monkeypatch.delattr(module, "compute_text_seq_len_from_mask")
        with pytest.raises(UnavailableError, match=r"blocks\.0 .*padded text.*update diffusers"):
            enable(qwen.pipe, CURVE)


def with_images(inputs: dict, *grids: tuple[int, int, int]) -> dict:
    """The inputs with random given images behind the picture."""
    generator = torch.Generator().manual_seed(4)
    count, (batch, _, channels) = sum(f * h * w for f, h, w in grids), inputs["hidden_states"].shape
    tokens = torch.randn(batch, count, channels, generator=generator)
    shapes = [[*sample, *grids] for sample in inputs["img_shapes"]]
    hidden = torch.cat([inputs["hidden_states"], tokens], 1)
    return inputs | {"hidden_states": hidden, "img_shapes": shapes}


GIVEN = {  # token grids of the images, and the layout's anchor
    "one": ([(1, 5, 7)], (1, 5, 7)),
    "two-alike": ([(1, 3, 4), (1, 3, 4)], (2, 3, 4)),
    "two": ([(1, 3, 4), (1, 2, 5)], (1, 1, 22)),
}


class TestGivenImages:
    """Every token attends to them, and they to every token."""

    @pytest.mark.parametrize("config", [{}, {"zero_cond_t": True}], ids=["edit", "edit-2511"])
    @pytest.mark.parametrize(("grids", "anchor"), GIVEN.values(), ids=GIVEN)
    def test_matches_masked_dense(self, qwen, masked, grids, anchor, config):
        pipe, ref = qwen.make(**config), qwen.make(**config).transformer
        inputs = with_images(qwen.inputs(pipe), *grids)
        mask_layers(ref, masked, Clear(3), layout(anchor=anchor))
        enable(pipe, CURVE)
        with torch.no_grad():
            expected = ref(**inputs)[0]
            close(pipe.transformer(**inputs)[0], expected)
            disable(pipe)
            assert not torch.allclose(pipe.transformer(**inputs)[0], expected, atol=1e-3)
        assert layout(anchor=anchor) == FAMILY.layout(pipe.transformer, inputs, {})

    def test_layers_are_frames(self, qwen, masked):
        config = {"use_layer3d_rope": True, "use_additional_t_cond": True}
        pipe, ref = qwen.make(**config), qwen.make(**config).transformer
        inputs = qwen.inputs(qwen.pipe) | {"additional_t_cond": torch.tensor([0])}
        inputs = with_images(inputs, (1, 8, 12), (1, 8, 12), (1, 4, 6))
        pattern = Neighborhood((3, 3, 3))
        mask_layers(ref, masked, pattern, layout((3, 8, 12), anchor=(1, 4, 6)))
        enable(pipe, Recipe(pattern, order="hilbert"))
        with torch.no_grad():
            close(pipe.transformer(**inputs)[0], ref(**inputs)[0])
        inputs["img_shapes"] = [[(1, 8, 12), (1, 4, 6), (1, 8, 12)]]
        with pytest.raises(ValueError, match=r"layers .* must be of one size, got .*disable"):
            pipe.transformer(**inputs)

    def test_summary_names_them(self, qwen):
        inputs = with_images(qwen.inputs(qwen.pipe), (1, 5, 7))
        enable(qwen.pipe, CURVE)
        with torch.no_grad():
            qwen.pipe.transformer(**inputs)
        expected = "grid 1 x 8 x 12 tokens + 7 text + 35 of given images, attended densely"
        assert expected in str(summary(qwen.pipe))


def test_shapes():
    grid, given = (1, 8, 12), (1, 4, 4)
    assert shapes_of([[grid, given]] * 2) == [grid, given]
    assert shapes_of([grid, grid]) == [grid]  # of ControlNet's pipelines
    assert shapes_of(grid) == [grid]
    with pytest.raises(ValueError, match=r"samples of a Qwen-Image call must have the same `img_shapes`"):
        shapes_of([[grid], [given]])


def test_family_of(qwen):
    assert family_of(qwen.pipe.transformer) is FAMILY
    assert list(FAMILY.layers(qwen.pipe.transformer)) == ["blocks.0", "blocks.1", "blocks.2"]


def test_runs_above_native_size_are_refused(qwen):
    with pytest.raises(UnavailableError, match=r"'qwen-image': its autoencoder .* videos; call the pipeline"):
        generate(qwen.pipe, "a cat", width=256, height=256, native=(64, 64))
