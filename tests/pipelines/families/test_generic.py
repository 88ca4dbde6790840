"""Transformers of no known family, of which `enable` is told where their tokens are."""

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel, OvisImageTransformer2DModel
from torch.nn import functional as F

from dit_accel import TokenLayout
from dit_accel.errors import UnavailableError
from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import Clear, Dense, Neighborhood
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, disable, enable
from dit_accel.summary import summary

VIDEO, IMAGE = TokenLayout((3, 6, 8)), TokenLayout((1, 8, 12), text_len=7, text_first=True)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class LTX:
    """Self-attention over video tokens, and cross-attention to padded text in every block."""

    layout, pattern = VIDEO, Neighborhood((3, 3, 3))

    def __init__(self):
        torch.manual_seed(0)
        sizes = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16}
        sizes |= {"cross_attention_dim": 32, "num_layers": 2, "caption_channels": 16}
        self.transformer = LTXVideoTransformer3DModel(**sizes).eval()
        self.inputs = {
            "hidden_states": random(2, 144, 4),
            "encoder_hidden_states": random(2, 5, 16),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
            "num_frames": 3,
            "height": 6,
            "width": 8,
        }

    @staticmethod
    def layout_of(inputs: dict) -> TokenLayout:
        return TokenLayout((inputs["num_frames"], inputs["height"], inputs["width"]))


class Ovis:
    """Joint attention with text in front, in double-stream and single-stream blocks."""

    layout, pattern = IMAGE, Clear(3)

    def __init__(self):
        torch.manual_seed(0)
        sizes = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
        sizes |= {"num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6)}
        self.transformer = OvisImageTransformer2DModel(**sizes).eval()
        rows = torch.cartesian_prod(torch.tensor([0.0]), torch.arange(8.0), torch.arange(12.0))
        self.inputs = {
            "hidden_states": random(2, 96, 4),
            "encoder_hidden_states": random(2, 7, 16),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": rows,
            "txt_ids": torch.zeros(7, 3),
        }

    @staticmethod
    def layout_of(inputs: dict) -> TokenLayout:
        return TokenLayout((1, 8, 12), text_len=inputs["encoder_hidden_states"].shape[1], text_first=True)


@pytest.fixture(params=[LTX, Ovis], ids=["ltx", "ovis"])
def model(request):
    return request.param()


@torch.no_grad()
def predict(model) -> torch.Tensor:
    return model.transformer(**model.inputs)[0]


def under_mask(model, monkeypatch, mask: torch.Tensor) -> torch.Tensor:
    """The prediction when attention over as many tokens as the mask has gets the mask."""
    attend, masked = F.scaled_dot_product_attention, []

    def maybe_masked(query, key, value, attn_mask=None, **options):
        if query.shape[2] == key.shape[2] == mask.shape[-1]:
            masked.append(attn_mask is None)
            attn_mask = mask
        return attend(query, key, value, attn_mask=attn_mask, **options)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", maybe_masked)
        predicted = predict(model)
    assert masked == [True, True]
    return predicted


@pytest.mark.parametrize("order", ["raster", "hilbert"])
@pytest.mark.parametrize("told", ["layout", "function"])
def test_matches_dense_attention_under_masks(model, monkeypatch, told, order):
    """Outside of attention tokens stay in the model's order."""
    dense = predict(model)
    expected = under_mask(model, monkeypatch, model.pattern.token_mask(model.layout))
    assert not torch.allclose(expected, dense, atol=1e-2)
    layout = model.layout if told == "layout" else model.layout_of
    recipe = Recipe(model.pattern, order=order, block_size=(16, 16))
    with accelerated(model.transformer, recipe, layout=layout) as handle:
        for _ in range(2):
            torch.testing.assert_close(predict(model), expected, rtol=1e-4, atol=1e-5)
        assert handle.token_order() is None
    assert torch.equal(predict(model), dense)


def test_dense_steps_and_heads(model, monkeypatch):
    """Of two steps the first is dense."""
    dense = predict(model)
    masks = torch.stack([model.pattern.token_mask(model.layout), Dense().token_mask(model.layout)])
    recipe = Recipe({"heads.0": model.pattern}, dense_steps=1, block_size=(16, 16))
    handle = enable(model.transformer, recipe, layout=model.layout)
    handle.begin(2)
    torch.testing.assert_close(predict(model), dense, rtol=1e-4, atol=1e-5)
    model.inputs["timestep"] = model.inputs["timestep"] / 2
    actual = predict(model)
    disable(model.transformer)
    torch.testing.assert_close(actual, under_mask(model, monkeypatch, masks), rtol=1e-4, atol=1e-5)


def test_cross_attention_stays_dense_and_is_named():
    model = LTX()
    handle = enable(model.transformer, Neighborhood((3, 3, 3)), layout=VIDEO)
    predict(model)
    predict(model)
    rows = summary(model.transformer).rows
    notes = [row["note"] for row in rows if row["pattern"] is None]
    assert notes == ["model's own attention: attends from 144 to 5 tokens"] * 2
    assert len([row for row in rows if row["density"] is not None and row["density"] < 1]) == 2
    assert "of no known family" in str(summary(model.transformer))
    assert handle.run_density < 1


class TestRefuses:
    def test_a_layout_of_no_layer(self, model):
        wrong = TokenLayout((2, 6, 8))
        enable(model.transformer, Clear(3), layout=wrong)
        message = r"no sparse layer .* attends to the 96 tokens of the `layout` given to `enable`, but to \d+"
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                predict(model)
        enable(model.transformer, Recipe(Clear(3), dense_steps=1), layout=wrong)
        with pytest.raises(ValueError, match=message):  # dense steps do not hide it
            predict(model)

    def test_guidance(self, model):
        recipe = Recipe(model.pattern, guidance=HeadPerturbation([(0, 0)]))
        with pytest.raises(
            UnavailableError, match=r"blocks of a transformer.* is of no known family; use guid"
        ):
            enable(model.transformer, recipe, layout=model.layout)

    def test_what_is_no_layout(self, model):
        with pytest.raises(TypeError, match=r"`layout` must be a TokenLayout or a function .* got tuple"):
            enable(model.transformer, model.pattern, layout=(1, 8, 12))

    def test_without_a_layout(self):
        model = Ovis()
        with pytest.raises(TypeError, match=r"is not supported; .*`layout`"):
            enable(model.transformer, model.pattern)

    def test_a_transformer_without_such_layers(self, sd3):
        with pytest.raises(UnavailableError, match=r"no attention layer .* call `dit_accel.attention`"):
            enable(sd3.pipe.transformer, Clear(3), layout=IMAGE)

    def test_masks_in_sparse_layers(self):
        """A sparse layer cannot take LTX's mask, were it as long as its tokens."""
        model = LTX()
        model.inputs["encoder_hidden_states"] = random(2, 144, 16)
        model.inputs["encoder_attention_mask"] = torch.ones(2, 144)
        enable(model.transformer, Neighborhood((3, 3, 3)), layout=VIDEO)
        with pytest.raises(ValueError, match="an `attention_mask` is not supported in accelerated layers"):
            predict(model)


def test_disable_is_bit_identical(model):
    dense = predict(model)
    processors = [m.processor for m in model.transformer.modules() if hasattr(m, "processor")]
    with accelerated(model.transformer, model.pattern, layout=model.layout):
        predict(model)
    assert torch.equal(predict(model), dense)
    assert processors == [m.processor for m in model.transformer.modules() if hasattr(m, "processor")]
