"""Rectified: shares, trust and the two corrections against loops in float64, on top of any mask."""

import dataclasses
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dit_accel import Recipe, TokenLayout, attention, presets
from dit_accel.attention.call import AttentionCall
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.errors import UnavailableError
from dit_accel.masks import orders
from dit_accel.patterns import (
    Clear,
    Clustered,
    Dense,
    InwardWindow,
    LocalGlobal,
    Rectified,
    Routed,
    SparseVideoGen,
)
from dit_accel.patterns.rectified import adjacent_blocks
from dit_accel.pipelines import family_of
from dit_accel.runtime.switching import accelerated

SIZE = 32
ALONE = Rectified(block_size=SIZE, mass=0.2, neighbours=False)
SETTINGS = {
    "alone": ALONE,
    "least": dataclasses.replace(ALONE, least=2),
    "neighbours": dataclasses.replace(ALONE, neighbours=True),
    "trusting": dataclasses.replace(ALONE, gain_aware=False),
    "static": Rectified(InwardWindow((1, 1)), block_size=SIZE, gain_aware=False),
    "static-aware": Rectified(Clear(2), block_size=SIZE),
    "routed": Rectified(Routed(top_k=0.3, block_size=(16, 16)), block_size=SIZE, gain_aware=False),
}
LAYOUTS = {
    "video": TokenLayout((3, 7, 7)),
    "text-last": TokenLayout((2, 7, 8), 9),
    "text-first": TokenLayout((1, 10, 13), 20, True),
    "anchor": TokenLayout((1, 8, 12), 5, anchor=(1, 3, 4)),
    "short": TokenLayout((1, 1, 3), 20),
}


def inputs(layout, batch=1, heads=2, dim=8):
    """Smooth along the tokens, so that pooling says something."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, heads, layout.seq_len, dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    at = torch.linspace(0, 6, layout.seq_len, dtype=torch.float64)[:, None] + torch.arange(dim)
    return 0.3 * q + 2 * at.sin(), 0.3 * k + 2 * at.cos(), v + at.sin()


def call_of(q, k, v, layout, **options):
    return AttentionCall(q, k, v, layout, dense=None, backend="gather", **options)


def expected(pattern, q, k, v, layout, order, kept, text_valid=None):
    """The definition in loops, given which pairs are kept, bool (B, H, S, S), in the model's order.

    Returns:
        the output, and the log-sum-exp: of a row's own scores less the logarithm of their share.
    """
    start, others = layout.visual_slice.start, layout.text_last[layout.visual_len :].tolist()
    visual = [start + int(t) for t in order]
    blocks = [
        torch.tensor(visual[at : at + pattern.block_size]) for at in range(0, len(visual), pattern.block_size)
    ]
    scale, out, lse = q.shape[-1] ** -0.5, torch.empty_like(q), torch.empty_like(q[..., 0])
    for b in range(q.shape[0]):
        hidden = torch.zeros(layout.seq_len, dtype=torch.bool)
        if text_valid is not None:
            hidden = layout.padding(text_valid)[b]
        real = [t for t in others if not hidden[t]]
        for h in range(q.shape[1]):
            Q, K, V = q[b, h], k[b, h], v[b, h]
            scores = (Q @ K.T * scale).masked_fill(~kept[b, h] | hidden, -math.inf)
            sparse = scores.softmax(-1) @ V
            out[b, h], lse[b, h] = sparse, scores.logsumexp(-1)
            for row in blocks:
                mean, spread = Q[row].mean(0), (Q[row] - Q[row].mean(0)).abs().mean(0)
                weights = [len(c) * math.exp(float(mean @ K[c].mean(0)) * scale) for c in blocks]
                total = sum(weights) + sum(math.exp(float(mean @ K[t]) * scale) for t in real)
                share, added = 1.0, torch.zeros_like(mean)
                for column, weight in zip(blocks, weights, strict=True):
                    center = K[column].mean(0)
                    lost = abs(float(spread @ center)) + abs(float(mean @ (K[column] - center).abs().mean(0)))
                    if pattern.gain_aware and not abs(float(mean @ center)) > lost:
                        continue
                    part = kept[b, h][row[:, None], column].double().mean()
                    share -= weight / total * (1 - part)
                    added += weight / total * (1 - part) * V[column].mean(0)
                out[b, h, row] = share * sparse[row] + added
                lse[b, h, row] -= math.log(max(share, 1e-300))
    return out, lse


@pytest.mark.parametrize("order", ["raster", "hilbert"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_computes_what_the_method_says(name, layout, order):
    """With padded text where there is text."""
    pattern, (q, k, v) = SETTINGS[name], inputs(layout)
    text_valid = torch.tensor([2]) if layout.text_len else None
    layer = layer_attention([pattern] * 2, LayerMasks(layout, order, (16, 16), torch.device("cpu")))
    call = call_of(q, k, v, layout, text_valid=text_valid)
    inner = layer.inner.resolved(call)
    kept = inner.mask.to_token_mask().expand(*q.shape[:2], layout.seq_len, layout.seq_len)
    visual = getattr(orders, order)(layout.grid)
    out, lse = expected(pattern, q, k, v, layout, visual, kept, text_valid)
    assert torch.allclose(layer(call), out, rtol=0, atol=1e-11)
    for found, said in zip(layer.with_lse(call), (out, lse), strict=True):
        assert torch.allclose(found, said, rtol=0, atol=1e-11)
    if pattern.base is not None and not pattern.base.online:
        assert torch.equal(kept[0, 0], pattern.base.token_mask(layout))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_chooses_what_the_method_says(layout):
    """By falling shares, text as one beside the blocks; neighbours and text are kept."""
    for pattern in (ALONE, dataclasses.replace(ALONE, least=3), SETTINGS["neighbours"]):
        q, k, _ = inputs(layout)
        mask = pattern.select(q, k, layout).to_token_mask()
        start, others = layout.visual_slice.start, layout.text_last[layout.visual_len :].tolist()
        visual = [start + int(t) for t in orders.hilbert(layout.grid)]
        blocks = [visual[at : at + SIZE] for at in range(0, len(visual), SIZE)]
        places = visual + others
        whole = [places[at : at + SIZE] for at in range(0, len(places), SIZE)]
        near = adjacent_blocks(layout, orders.hilbert(layout.grid), SIZE)
        for h in range(2):
            for i, row in enumerate(whole):
                mean = q[0, h][[t for t in row if t in visual] or row].mean(0) / 8**0.5
                weights = [len(c) * math.exp(float(mean @ k[0, h][c].mean(0))) for c in blocks]
                weights.append(sum(math.exp(float(mean @ k[0, h][t])) for t in others))
                falling = sorted(range(len(weights)), key=lambda j: (-weights[j], j))
                mass, count = 0.0, 0
                while mass < pattern.mass * sum(weights):
                    mass, count = mass + weights[falling[count]], count + 1
                chosen = set(falling[: max(count, pattern.least)])
                for j, column in enumerate(whole):
                    mixed = not set(row) | set(column) <= set(visual)
                    by = j in chosen or (
                        pattern.neighbours and j < len(near) and i < len(near) and near[i, j]
                    )
                    kept = mask[0, h][torch.tensor(row)[:, None], torch.tensor(column)]
                    assert kept.all() if mixed or by else not kept.any()


@pytest.mark.parametrize("gain_aware", [False, True])
@pytest.mark.parametrize("layout", [LAYOUTS["text-first"], LAYOUTS["video"]], ids=["text", "video"])
def test_removes_the_bias_where_pooling_is_exact(layout, gain_aware):
    """Of equal queries and keys in each block it is dense attention, whatever v; sparse is far off."""
    q, k, v = inputs(layout)
    pattern = dataclasses.replace(ALONE, order="raster", gain_aware=gain_aware)
    for x in (q, k):
        for at in range(layout.visual_slice.start, layout.visual_slice.stop, SIZE):
            part = slice(at, min(at + SIZE, layout.visual_slice.stop))
            x[:, :, part] = x[:, :, part].mean(2, keepdim=True)
    dense = F.scaled_dot_product_attention(q, k, v)
    mask = pattern.select(q, k, layout).to_token_mask()
    sparse = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    actual = attention(q, k, v, pattern, layout)
    assert not mask.all()
    assert (sparse - dense).abs().max() > 0.1
    torch.testing.assert_close(actual, dense, rtol=0, atol=1e-11)


def test_what_is_not_to_be_trusted_is_not_pooled():
    """A block whose keys differ more than their mean says adds nothing and is not taken off."""
    layout = TokenLayout((1, 2, 16))
    q, k, v = (torch.ones(1, 1, 32, 8, dtype=torch.float64) for _ in range(3))
    k[:, :, 16:] = torch.tensor([9.0, -9.1]).repeat_interleave(4)  # its mean says little of them
    v[:, :, 16:] = 5
    k[:, :, 16::2] *= -1
    base = Rectified(Routed(top_k=0.5, block_size=(16, 16)), block_size=16)
    aware = attention(q, k, v, base, layout)
    sparse = attention(q, k, v, base.base, layout)
    trusting = attention(q, k, v, dataclasses.replace(base, gain_aware=False), layout)
    torch.testing.assert_close(aware, sparse)
    assert not torch.allclose(trusting, sparse)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "pattern",
    [dataclasses.replace(ALONE, mass=1.0), Rectified(Dense()), Rectified(Clustered(5, 7, 1.0, 1.0))],
    ids=["alone", "dense", "clustered"],
)
def test_all_blocks_kept_is_dense(pattern, layout):
    q, k, v = inputs(layout)
    out = attention(q, k, v, pattern, layout)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["native", "gather", "reference"])
@pytest.mark.parametrize(
    "base", [None, Clear(3), Routed(top_k=0.3, block_size=(64, 32)), Clustered(5, 7, 0.3)]
)
def test_backends_agree_with_float64(base, backend):
    layout = TokenLayout((2, 8, 8), 9)
    q, k, v = inputs(layout)
    pattern = Rectified(base, block_size=64, mass=0.2, neighbours=False, gain_aware=False)
    exact = attention(q, k, v, pattern, layout)
    actual = attention(q.float(), k.float(), v.float(), pattern, layout, backend=backend)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-5)
    assert (exact - F.scaled_dot_product_attention(q, k, v)).abs().max() > 1e-3


@given(
    st.builds(
        TokenLayout, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), st.integers(0, 20)
    ),
    st.sampled_from([16, 32, 48]),
    st.floats(0.05, 1),
    st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_any_layout(layout, size, mass, gain_aware):
    pattern = Rectified(mass=mass, block_size=size, gain_aware=gain_aware, order="raster")
    q, k, v = inputs(layout)
    kept = pattern.select(q, k, layout).to_token_mask()
    actual = attention(q, k, v, pattern, layout)
    said, _ = expected(pattern, q, k, v, layout, orders.raster(layout.grid), kept)
    assert torch.allclose(actual, said, rtol=0, atol=1e-11)


class RectifyingProcessor:
    """diffusers' own processor with `dit_accel.attention` in place of PyTorch's."""

    def __init__(self, original, pattern, grid, text_first):
        self.original, self.pattern, self.grid, self.text_first = original, pattern, grid, text_first

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        def rectifying(query, key, value, attn_mask=None, **options):
            layout = TokenLayout(self.grid, query.shape[2] - math.prod(self.grid), self.text_first)
            valid = None if attn_mask is None else attn_mask.view(len(query), -1).sum(1) - layout.visual_len
            return attention(query, key, value, self.pattern, layout, text_valid=valid)

        with mock.patch.object(F, "scaled_dot_product_attention", rectifying):
            inputs = (hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
            return self.original(attn, *inputs)


@pytest.mark.parametrize("pattern", [ALONE, Rectified(Routed(top_k=0.3, block_size=(16, 16)), block_size=32)])
@pytest.mark.parametrize("family", ["flux", "wan", "hunyuan"])
def test_in_pipelines(family, pattern, request):
    """With guidance, two samples and dense steps; text first, none, and padded."""
    case = request.getfixturevalue(family)
    run, ref = {"batch": 2, "cfg": 3.0, "steps": 2}, case.make()
    dense = case.run(case.pipe, **run)
    grid = (1, 8, 12) if family == "flux" else (3, 6, 8)
    for module in family_of(ref.transformer).layers(ref.transformer).values():
        module.set_processor(RectifyingProcessor(module.processor, pattern, grid, family == "flux"))
    expected = case.run(ref, **run)
    with accelerated(case.pipe, pattern):
        actual = case.run(case.pipe, **run)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, dense, atol=1e-3)
    assert torch.equal(case.run(case.pipe, **run), dense)


def test_recipes_are_written_and_read():
    for pattern in SETTINGS.values():
        assert Recipe.from_yaml(Recipe(pattern).to_yaml()) == Recipe(pattern)
        assert pattern == eval(repr(pattern))
    assert presets("flux")["flux-rectified"].attention.least == 51


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": ALONE}, "`base` must be a static pattern, Routed, Clustered or None"),
        ({"base": SparseVideoGen(0.5)}, "`base` must be a static pattern"),
        ({"mass": 0}, "`mass` must be a number above 0"),
        ({"least": 0}, "`least` must be a positive integer"),
        ({"neighbours": None}, "`neighbours` must be True or False"),
        ({"order": "spiral"}, "`order` must be one of gilbert"),
        ({"block_size": 100}, "`block_size` must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rectified(**arguments)


def test_what_does_not_go_together_is_refused():
    layout = TokenLayout((1, 8, 8), 4)
    q, k, v = inputs(layout)
    with pytest.raises(UnavailableError, match="both stand for what is left out"):
        attention(q, k, v, ALONE, layout, tail="pooled")
    with pytest.raises(ValueError, match=r"`block_size` 48 must be a multiple"):
        attention(q, k, v, Rectified(Clear(2), block_size=48), layout)
    beside = TokenLayout((1, 8, 8), 4, anchor=(1, 2, 2))
    with pytest.raises(ValueError, match="anchor tokens see no visual ones"):
        attention(*inputs(beside), Rectified(LocalGlobal(3), block_size=64), beside)
