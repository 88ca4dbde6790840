"""Transformers that are refused, by name and with the reason, in both ways to enable."""

import pytest

from dit_accel import TokenLayout, enable
from dit_accel.errors import UnavailableError
from dit_accel.patterns import ChunkCausal, Clear
from dit_accel.pipelines.families.refused import REASONS


def test_linear_attention_of_videos():
    import diffusers

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
    sizes |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24}
    transformer = diffusers.SanaVideoTransformer3DModel(**sizes, num_layers=1, caption_channels=8)
    reason = r"SanaVideoTransformer3DModel is not supported: the attention over its tokens is linear already"
    with pytest.raises(TypeError, match=reason):
        enable(transformer, ChunkCausal(3))
    with pytest.raises(UnavailableError, match=reason):
        enable(transformer, ChunkCausal(3), layout=TokenLayout((3, 4, 4)))


def test_attention_that_is_linear_already():
    import diffusers

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    sizes |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
    transformer = diffusers.SanaTransformer2DModel(**sizes, num_layers=1, caption_channels=16, sample_size=8)
    reason = r"SanaTransformer2DModel is not supported: the attention over its tokens is linear"
    with pytest.raises(TypeError, match=reason):
        enable(transformer, Clear(3))
    with pytest.raises(UnavailableError, match=reason):
        enable(transformer, Clear(3), layout=TokenLayout((1, 4, 4)))


@pytest.mark.parametrize("name", REASONS)
def test_classes_are_those_of_diffusers(name):
    import diffusers

    assert hasattr(diffusers, name)
