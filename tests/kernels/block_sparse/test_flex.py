"""FlexAttention stays compiled however many shapes and masks it meets."""

import pytest
import torch
from torch._dynamo.utils import counters

from dit_accel import BlockMask
from dit_accel.kernels.block_sparse import flex, reference
from dit_accel.kernels.block_sparse.problem import Problem


def attend(tokens: int) -> None:
    torch.manual_seed(tokens)
    mask = BlockMask.from_token_mask(torch.rand(tokens, tokens) < 0.5, (32, 32))
    q, k, v = torch.randn(3, 1, 2, tokens, 16)
    out, _ = flex.attend(q, k, v, mask, Problem.of(q, k, v, mask), scale=0.25, text_valid=None)
    expected, _ = reference.attention(q, k, v, mask, scale=0.25)
    torch.testing.assert_close(out, expected)


def test_more_masks_than_pytorch_compiles_by_itself(uncompiled_flex, caplog):
    masks = torch._dynamo.config.recompile_limit + 2
    for number in range(masks):
        attend(128 + 32 * number)
    assert counters["stats"]["unique_graphs"] == masks
    assert "recompile_limit" not in caplog.text


def test_the_last_resort_is_an_error_not_uncompiled_attention(uncompiled_flex, monkeypatch):
    monkeypatch.setattr(flex, "SHAPES", 2)
    for tokens in (128, 160):
        attend(tokens)
    with pytest.raises(Exception, match="fullgraph"):
        attend(192)
