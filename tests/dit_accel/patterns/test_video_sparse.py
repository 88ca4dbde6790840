"""Video sparse attention against loops over cubes in float64: borders, orders, text, gradients."""

import math

import pytest
import torch

import dit_accel
from dit_accel import TokenLayout, UnavailableError
from dit_accel.attention.arrangement import call_order
from dit_accel.attention.call import AttentionCall, LayerSizes
from dit_accel.attention.cubes import Cubes
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.patterns import Dense, Neighborhood, VideoSparse

LAYOUTS = {
    "whole": TokenLayout((4, 4, 8)),
    "cut": TokenLayout((3, 5, 7)),
    "text-last": TokenLayout((3, 6, 8), 9),
    "text-first": TokenLayout((1, 8, 12), 16, True),
    "anchor": TokenLayout((1, 8, 8), 5, anchor=(1, 3, 4)),
    "smaller-than-a-cube": TokenLayout((1, 3, 1), 20),
}
PATTERN = VideoSparse(0.3, (2, 4, 2))


def inputs(layout, seed=0, batch=2, heads=2, dim=16):
    """q, k, v (B, H, S, D) and the gate (B, H, V, D), float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, layout.seq_len, dim, generator=generator, dtype=torch.float64)
    gate = torch.randn(batch, heads, layout.visual_len, dim, generator=generator, dtype=torch.float64)
    return q, k, v, gate


def one_head(q, k, v, gate, layout, pattern, hidden):
    """The output (S, D) of one sample and head, by the words, in the model's order; no gate: None."""
    first = layout.visual_slice.start
    found: dict[tuple, list[int]] = {}
    for token, place in enumerate(layout.coordinates.tolist()):
        key = tuple(n // side for n, side in zip(place, pattern.cube, strict=True))
        found.setdefault(key, []).append(first + token)
    cubes = list(found.values())
    visual = {token for cube in cubes for token in cube}
    others = [t for t in range(layout.seq_len) if t not in visual and not hidden[t]]
    means = [torch.stack([x[cube].mean(0) for cube in cubes]) for x in (q, k, v)]
    weights = (means[0] @ means[1].T / math.sqrt(q.shape[1])).softmax(-1)
    kept = max(1, math.ceil(round(pattern.top_k * len(cubes), 9)))
    out = torch.empty_like(q)
    for i, cube in enumerate(cubes):
        strongest = sorted(range(len(cubes)), key=lambda j, i=i: -weights[i, j].item())[:kept]
        seen = [t for j in strongest for t in cubes[j]] + others
        own = (q[cube] @ k[seen].T / math.sqrt(q.shape[1])).softmax(-1) @ v[seen]
        if gate is not None:
            own = own + gate[[t - first for t in cube]] * (weights[i] @ means[2])
        out[cube] = own
    rest = [t for t in range(layout.seq_len) if t not in visual]
    seen = sorted(visual) + others
    out[rest] = (q[rest] @ k[seen].T / math.sqrt(q.shape[1])).softmax(-1) @ v[seen]
    return out


def by_hand(q, k, v, gate, layout, pattern=PATTERN, valid=None):
    none = torch.zeros(len(q), layout.seq_len, dtype=torch.bool)
    hidden = none if valid is None else layout.padding(valid)
    gates = [[None] * q.shape[1]] * len(q) if gate is None else gate
    heads = [
        [one_head(q[b, h], k[b, h], v[b, h], gates[b][h], layout, pattern, hidden[b]) for h in range(2)]
        for b in range(len(q))
    ]
    return torch.stack([torch.stack(own) for own in heads])


def layer_of(layout, places=None, heads=(PATTERN, PATTERN)):
    return layer_attention(list(heads), LayerMasks(layout, "auto", (16, 8), torch.device("cpu"), places))


def call_of(layout, q, k, v, gate, **options):
    learned = {"to_gate_compress.weight": torch.zeros(1), "to_gate_compress.bias": torch.zeros(1)}
    options = {"backend": "reference", **options}
    return AttentionCall(q, k, v, layout, dense=None, learned=learned, beside=gate, **options)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_it_is_the_formula(layout):
    valid = torch.tensor([layout.text_len, layout.text_len // 2]) if layout.text_len else None
    given = inputs(layout)
    call, layer = call_of(layout, *given, text_valid=valid), layer_of(layout)
    real = torch.ones(2, layout.seq_len, dtype=torch.bool) if valid is None else ~layout.padding(valid)
    expected = by_hand(*given, layout, valid=valid)
    for out in (layer(call), layer.resolved(call)(call)):
        assert_same(out.transpose(1, 2)[real], expected.transpose(1, 2)[real])


@pytest.mark.parametrize("name", ["text-last", "text-first", "anchor"])
def test_the_order_of_calls_is_none_of_its_business(name):
    layout = LAYOUTS[name]
    q, k, v, gate = inputs(layout, 1)
    places = torch.randperm(layout.visual_len, generator=torch.Generator().manual_seed(0))
    order = call_order(layout, places)
    call = call_of(layout, *(x[:, :, order] for x in (q, k, v)), gate[:, :, places])
    out = layer_of(layout, places)(call)[:, :, torch.argsort(order)]
    assert_same(out, by_hand(q, k, v, gate, layout))


def test_gradients():
    """Of all that is given, through the means too; the choice has none."""
    layout = LAYOUTS["text-last"]
    mine, theirs = ([x.clone().requires_grad_() for x in inputs(layout)] for _ in range(2))
    layer_of(layout)(call_of(layout, *mine)).square().sum().backward()
    by_hand(*theirs, layout).square().sum().backward()
    for own, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own.grad, right.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_short_numbers_on_the_cpus_kernel(dtype):
    """Off float64 by little more than rounding its result is; autocast changes nothing."""
    layout = LAYOUTS["text-last"]
    given = [x.to(dtype) for x in inputs(layout, 2)]
    call = call_of(layout, *given, backend="auto")
    out = layer_of(layout)(call)
    assert out.dtype == dtype
    expected = by_hand(*(x.double() for x in given), layout)
    least = (expected.to(dtype).double() - expected).abs().max()
    assert (out.double() - expected).abs().max() <= 4 * least + 16 * torch.finfo(torch.float32).eps
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer_of(layout)(call), out)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_without_a_gate_only_chosen_cubes_count(layout):
    """With the log-sum-exp; what was told is what was computed."""
    q, k, v, _ = inputs(layout)
    out, lse = dit_accel.attention(q, k, v, PATTERN, layout, return_lse=True)
    assert_same(out, by_hand(q, k, v, None, layout))
    tokens = layout.seq_len
    mask = PATTERN.select(q, k, layout).to_token_mask()[..., :tokens, :tokens]
    scores = (q @ k.mT / 4).masked_fill(~mask, -torch.inf)
    assert_same(lse, scores.logsumexp(-1))
    call = AttentionCall(q, k, v, layout, dense=None, backend="reference")
    layer = layer_of(layout)
    layer(call)
    density, blocks = call.notes["achieved"]
    assert density.item() == pytest.approx(mask.double().mean().item())
    assert blocks.item() == pytest.approx(layer.block_density)
    if layout.grid == (4, 4, 8):
        assert density.item() == pytest.approx(PATTERN.density(layout))


def test_beside_heads_of_another_pattern():
    """Each head gets its own gate."""
    layout, other = LAYOUTS["cut"], Neighborhood((3, 3, 3))
    given = inputs(layout)
    out = layer_of(layout, heads=(other, PATTERN))(call_of(layout, *given))
    expected = dit_accel.attention(*given[:3], other, layout)
    assert_same(out[:, 0], expected[:, 0])
    assert_same(out[:, 1], by_hand(*given, layout)[:, 1])


def test_cubes_of_published_sizes():
    """Those of FastWan at 480p, as its authors count them."""
    cubes = Cubes.of(TokenLayout((21, 30, 52)), (4, 4, 4))
    assert (cubes.count, len(cubes.exists), len(cubes.cut)) == (624, 39_936, 169)
    assert VideoSparse(0.2).kept(624) == 125
    assert [VideoSparse(share).kept(100) for share in (0.07, 0.2, 0.001, 1)] == [7, 20, 1, 100]


def test_what_is_learned_and_what_is_refused():
    sizes, layout = LayerSizes(8, 3, 20), LAYOUTS["cut"]
    learned = PATTERN.learned(sizes)
    assert {name: tuple(x.shape) for name, x in learned.items()} == {
        "to_gate_compress.weight": (24, 20),
        "to_gate_compress.bias": (24,),
    }
    assert not any(x.any() for x in learned.values())
    weights = {name: torch.randn(x.shape, dtype=torch.float64) for name, x in learned.items()}
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    gate = x @ weights["to_gate_compress.weight"].T + weights["to_gate_compress.bias"]
    expected = torch.stack(gate.split(8, -1), 1)
    assert_same(PATTERN.of_input(x, weights, 3), expected)
    assert PATTERN.of_input(x, {}, 3) is None
    given = inputs(layout)
    with pytest.raises(UnavailableError, match="returns no lse"):
        layer_of(layout).with_lse(call_of(layout, *given))
    with pytest.raises(UnavailableError, match=r"call `unfuse_qkv_projections\(\)`"):
        layer_of(layout)(call_of(layout, *given[:3], None))
    with pytest.raises(ValueError, match="attention between the means of cubes for what it leaves out"):
        dit_accel.attention(*given[:3], PATTERN, layout, tail="pooled")
    with pytest.raises(ValueError, match="must be \\(16 or what divides it, 16\\): blocks are cubes"):
        PATTERN.select(*given[:2], layout, block_size=(64, 16))
    assert not torch.equal(dit_accel.attention(*given[:3], PATTERN, layout), given[0])
    torch.testing.assert_close(
        dit_accel.attention(*given[:3], VideoSparse(1, (2, 4, 2)), layout),
        dit_accel.attention(*given[:3], Dense(), layout),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "`top_k` must be a number above 0 and at most 1, got 0"),
        ({"top_k": True}, "`top_k` must be a number"),
        ({"cube": (4, 4)}, "`cube` must be 3 integers"),
        ({"cube": (3, 3, 4)}, r"multiple of 16 tokens, at most 4096, got \(3, 3, 4\) of 36"),
    ],
)
def test_values_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VideoSparse(**arguments)
