"""Pooled keys in every family: against diffusers' own attention to the same keys."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from dit_accel import TokenLayout, accelerated
from dit_accel.attention.pooled import Patches
from dit_accel.patterns import Clear
from dit_accel.recipe.recipe import Recipe

PATTERN = Clear(2, downsample=3)
GRIDS = {"flux": (5, 7), "sd3": (5, 7)}  # cut patches on both axes
CONFIGS = {"sd3": {"dual_attention_layers": (0, 2), "qk_norm": "rms_norm"}}


def with_pooled_keys(layout: TokenLayout):
    """PyTorch's attention under the pattern, for layers with the tokens of a layout, or its visual ones."""
    attend = F.scaled_dot_product_attention
    layouts = {own.seq_len: own for own in (TokenLayout(layout.grid), layout)}

    def pooled(query, key, value, attn_mask=None, **options):
        own = layouts.get(query.shape[2])
        if own is None or key.shape[2] != query.shape[2]:
            return attend(query, key, value, attn_mask=attn_mask, **options)
        patches, mask = Patches.of(own, PATTERN.downsample, None, "cpu"), PATTERN.token_mask(own)
        k, v = (torch.cat([x, patches.pool(x[:, :, own.visual_slice])], 2) for x in (key, value))
        if attn_mask is not None:
            mask = mask & F.pad(attn_mask, (0, patches.count), value=True)
        return attend(query, k, v, attn_mask=mask, **options)

    return mock.patch.object(F, "scaled_dot_product_attention", pooled)


@pytest.mark.parametrize("order", ["raster", "auto"])
@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "hunyuan", "hunyuan15"])
def test_every_family(families, name, order):
    tools = families[name]
    pipe = tools.make(**CONFIGS.get(name, {}))
    grid = GRIDS.get(name, (2, 5, 7))
    with accelerated(pipe, Recipe(PATTERN, order=order, block_size=(16, 16))) as handle:
        own = tools.run(pipe, grid=grid, steps=1, text_len=9, batch=2)
        layout = handle.bindings["transformer"].geometry.layout
        assert handle.run_density < 1
    with with_pooled_keys(layout):
        expected = tools.run(pipe, grid=grid, steps=1, text_len=9, batch=2)
    assert torch.allclose(own, expected, atol=1e-4)
    assert not torch.allclose(own, tools.run(pipe, grid=grid, steps=1, text_len=9, batch=2), atol=1e-3)
