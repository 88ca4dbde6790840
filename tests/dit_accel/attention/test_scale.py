"""Another scale of the scores is the same as other queries: for every pattern, and weakened heads."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from dit_accel import TokenLayout
from dit_accel.attention.call import AttentionCall
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.attention.perturbed import Perturbed
from dit_accel.guidance import HeadPerturbation
from dit_accel.patterns import (
    Clear,
    Clustered,
    InLine,
    Neighborhood,
    Rectified,
    Routed,
    Skipping,
    SparseLinear,
    SparseVideoGen,
    VideoSparse,
)

LAYOUT = TokenLayout((4, 8, 8), 16)
SIZE = (16, 16)
PATTERNS = {
    "clear": Clear(3),
    "clear-pooled": Clear(2, downsample=4),
    "neighborhood": Neighborhood((2, 4, 4)),
    "routed": Routed(top_p=0.5, block_size=SIZE),
    "antidiagonal": Routed(top_p=0.5, crossing=True, score="antidiagonal", stride=4, block_size=SIZE),
    "clustered": Clustered(8, 16, top_p=0.5, least=0.1, iterations=(3, 1)),
    "rectified": Rectified(mass=0.5, block_size=16),
    "rectified-routed": Rectified(Routed(top_p=0.5, block_size=SIZE)),
    "sparse-videogen": SparseVideoGen(keep=0.4, block_size=16),
    "sparse-linear": SparseLinear(top_k=0.3, block_size=SIZE),
    "video-sparse": VideoSparse(0.3, (2, 4, 4)),
    "skipping": Skipping(-3, block_size=SIZE),
    "inline": InLine(),
}


def dense(call: AttentionCall) -> torch.Tensor:
    return F.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)


def call_of(times: float = 1.0, **options) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, LAYOUT.seq_len, 16, generator=generator, dtype=torch.float64)
    return AttentionCall(4 * times * q, k, v, LAYOUT, dense, backend="reference", **options)


def computed(inner, scale: float | None, times: float = 1.0) -> torch.Tensor:
    return inner(call_of(times, scale=scale))


@pytest.mark.parametrize("name", PATTERNS)
def test_longer_queries(name):
    masks = LayerMasks(LAYOUT, "auto", SIZE, torch.device("cpu"), None)
    inner = layer_attention([PATTERNS[name]] * 2, masks)
    usual = 16**-0.5
    expected = computed(inner, None, times=0.25)
    torch.testing.assert_close(computed(inner, usual / 4), expected, rtol=0, atol=1e-12)
    assert (computed(inner, usual) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokens": "image"},
        {"kind": "temperature", "temperature": 0.5},
        {"kind": "seg"},
        {"kind": "uniform"},
    ],
    ids=str,
)
def test_weakened_heads(options):
    masks = LayerMasks(LAYOUT, "auto", SIZE, torch.device("cpu"), None)
    inner = layer_attention([PATTERNS["neighborhood"]] * 2, masks)
    perturbation = HeadPerturbation(heads=[(0, 0)], **options)
    weak = Perturbed(inner, perturbation, [0], torch.ones(1))
    expected = computed(weak, None, times=0.25)
    torch.testing.assert_close(computed(weak, 16**-0.5 / 4), expected, rtol=0, atol=1e-12)


def test_the_factor():
    call = call_of()
    assert call.factor == 0.25
    assert call.at_usual_scale() is call
    longer = dataclasses.replace(call, scale=0.5).at_usual_scale()
    assert longer.scale is None
    assert torch.equal(longer.q, 2 * call.q)
