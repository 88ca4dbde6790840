"""Faded attention to padded text against the formula in float64."""

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.attention.call import AttentionCall
from dit_accel.attention.faded import Faded
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.patterns import Clear, Neighborhood, Routed

PATTERNS = {"clear": Clear(2), "neighborhood": Neighborhood((3, 3)), "routed": Routed(top_k=0.3)}


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_is_a_sum_of_scores_and_a_mask_of_numbers(name, text_first):
    """With a sample without padding, one with some and one that is nothing else, and with gradients."""
    layout = TokenLayout((1, 6, 7), 9, text_first)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, 2, layout.seq_len, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    )
    valid = torch.tensor([9, 4, 0], dtype=torch.int32)
    inner = layer_attention(
        [PATTERNS[name]] * 2, LayerMasks(layout, "hilbert", (16, 16), torch.device("cpu"))
    )
    call = AttentionCall(q, k, v, layout, dense=None, text_valid=valid, backend="gather", scale=0.5)
    layer = Faded(inner, 9 - valid).resolved(call)

    own = inner.resolved(call).mask.to_token_mask()
    weight = (~layout.padding(valid)).double()
    scores = q @ k.mT * 0.5 + (weight[:, :, None] * weight[:, None])[:, None]
    scores = scores.masked_fill(~own, -torch.inf)
    expected = scores.softmax(-1) @ v

    out, lse = layer.with_lse(call)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(call), expected, rtol=0, atol=1e-12)
    shift = weight[:, None]  # of whole rows, which is left out
    torch.testing.assert_close(lse, scores.logsumexp(-1) - shift, rtol=0, atol=1e-12)
    assert not torch.allclose(inner(call), expected, atol=1e-3)
    given = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    grads = (torch.autograd.grad(x, (q, k, v), given, retain_graph=True) for x in (out, expected))
    for found, exact in zip(*grads, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)
