"""Agent attention and InLine against their dense formulas in float64: orders, text, kernels, gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

import dit_accel
from dit_accel import TokenLayout, UnavailableError
from dit_accel.attention.approximate import TAPS_IN
from dit_accel.attention.arrangement import call_order
from dit_accel.attention.call import AttentionCall, LayerSizes
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.patterns import Agent, Dense, InLine, Neighborhood
from dit_accel.recipe.recipe import Recipe

LAYOUTS = {
    "video": TokenLayout((3, 5, 7)),
    "text-last": TokenLayout((2, 6, 8), 9),
    "text-first": TokenLayout((1, 8, 12), 16, True),
    "anchor": TokenLayout((1, 8, 8), 5, anchor=(1, 3, 4)),
}
PATTERNS = {"agent": Agent((1, 2, 3), 0.4, 0.1), "inline": InLine()}


def inputs(layout, seed=0, batch=2, heads=2, dim=16):
    """q, k, v (B, H, S, D) and the local kernels (B, H, 9, D), float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, layout.seq_len, dim, generator=generator, dtype=torch.float64)
    return q, k, v, torch.randn(batch, heads, 9, dim, generator=generator, dtype=torch.float64)


def agents_by_hand(q, k, v, layout, pattern, seen):
    first, patches = layout.visual_slice.start, {}
    for token, place in enumerate(layout.coordinates.tolist()):
        key = tuple(n // side for n, side in zip(place, pattern.patch, strict=True))
        patches.setdefault(key, []).append(first + token)
    agents, s = torch.stack([q[own].mean(0) for own in patches.values()]), 1 / math.sqrt(q.shape[1])
    own = q[layout.visual_slice]
    through = (own @ agents.T * s**pattern.exponent).softmax(-1) @ (agents @ k[seen].T * s).softmax(-1)
    return through @ v[seen] + pattern.shortcut * v[layout.visual_slice]


def inline_by_hand(q, k, v, taps, layout, seen):
    """By its matrix of weights, and PyTorch's convolution."""
    number, s = len(seen), 1 / math.sqrt(q.shape[1])
    scores = q[layout.visual_slice] @ k[seen].T * s
    weights = scores / number + (1 - scores.mean(1, keepdim=True)) / number
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
    out = weights @ v[seen]
    if taps is None:
        return out
    frames = v[layout.visual_slice].unflatten(0, layout.grid).permute(0, 3, 1, 2)
    kernels = taps.T.reshape(-1, 1, 3, 3)
    local = F.conv2d(frames, kernels, padding=1, groups=len(kernels))
    return out + local.permute(0, 2, 3, 1).flatten(0, 2)


def one_head(q, k, v, taps, layout, pattern, hidden):
    seen = [t for t in range(layout.seq_len) if not hidden[t]]
    out = (q @ k[seen].T / math.sqrt(q.shape[1])).softmax(-1) @ v[seen]
    if isinstance(pattern, Agent):
        out[layout.visual_slice] = agents_by_hand(q, k, v, layout, pattern, seen)
    else:
        out[layout.visual_slice] = inline_by_hand(q, k, v, taps, layout, seen)
    return out


def by_hand(q, k, v, taps, layout, pattern, valid=None):
    none = torch.zeros(len(q), layout.seq_len, dtype=torch.bool)
    hidden = none if valid is None else layout.padding(valid)
    kernels = [[None] * q.shape[1]] * len(q) if taps is None else taps
    heads = [
        [one_head(q[b, h], k[b, h], v[b, h], kernels[b][h], layout, pattern, hidden[b]) for h in range(2)]
        for b in range(len(q))
    ]
    return torch.stack([torch.stack(own) for own in heads])


def layer_of(layout, pattern, places=None, other=None):
    heads = [other or pattern, pattern]
    return layer_attention(heads, LayerMasks(layout, "auto", (16, 8), torch.device("cpu"), places))


def call_of(layout, q, k, v, taps, **options):
    learned = {} if taps is None else {TAPS_IN: taps}
    options = {"backend": "reference", "learned": learned, **options}
    return AttentionCall(q, k, v, layout, dense=None, beside=taps, **options)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_it_is_the_formula(layout, pattern):
    valid = torch.tensor([layout.text_len, layout.text_len // 2]) if layout.text_len else None
    given = inputs(layout)
    out = layer_of(layout, pattern)(call_of(layout, *given, text_valid=valid))
    expected = by_hand(*given, layout, pattern, valid)
    real = torch.ones(2, layout.seq_len, dtype=torch.bool) if valid is None else ~layout.padding(valid)
    assert_same(out.transpose(1, 2)[real], expected.transpose(1, 2)[real])


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("name", ["video", "text-first", "anchor"])
def test_the_order_of_calls_is_none_of_its_business(name, pattern):
    layout = LAYOUTS[name]
    q, k, v, taps = inputs(layout, 1)
    places = torch.randperm(layout.visual_len, generator=torch.Generator().manual_seed(0))
    order = call_order(layout, places)
    call = call_of(layout, *(x[:, :, order] for x in (q, k, v)), taps)
    out = layer_of(layout, pattern, places)(call)[:, :, torch.argsort(order)]
    assert_same(out, by_hand(q, k, v, taps, layout, pattern))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_gradients_and_short_numbers(pattern):
    """In bf16 it is off float64 by little more than rounding in between and at the end is."""
    layout = LAYOUTS["text-last"]
    mine, theirs = ([x.clone().requires_grad_() for x in inputs(layout)] for _ in range(2))
    layer_of(layout, pattern)(call_of(layout, *mine)).square().sum().backward()
    by_hand(*theirs, layout, pattern).square().sum().backward()
    for own, right in zip(mine[: 3 + (pattern == InLine())], theirs, strict=False):
        torch.testing.assert_close(own.grad, right.grad, rtol=1e-9, atol=1e-9)
    given = [x.bfloat16() for x in inputs(layout, 2)]
    out = layer_of(layout, pattern)(call_of(layout, *given))
    assert out.dtype == torch.bfloat16
    expected = by_hand(*(x.double() for x in given), layout, pattern)
    assert (out.double() - expected).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_kernels_are_made_of_the_mean_input():
    sizes = LayerSizes(4, 3, 12)
    learned = InLine().learned(sizes)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert not InLine().of_input(x, learned, 3).any()  # before training
    generator = torch.Generator().manual_seed(0)
    learned = {n: torch.randn(w.shape, generator=generator, dtype=torch.float64) for n, w in learned.items()}
    inner = F.conv1d(
        x.mean(1)[..., None],
        learned["taps_in.weight"].flatten(0, 1)[..., None],
        learned["taps_in.bias"].flatten(),
        groups=3,
    )
    outer = F.conv1d(
        F.gelu(inner),
        learned["taps_out.weight"].flatten(0, 1)[..., None],
        learned["taps_out.bias"].flatten(),
        groups=3,
    )
    assert_same(InLine().of_input(x, learned, 3), outer.view(2, 3, 9, 4))
    assert InLine().of_input(x, {}, 3) is None


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_as_a_function_and_beside_heads_of_another_pattern(pattern):
    layout, other = LAYOUTS["video"], Neighborhood((3, 3, 3))
    q, k, v, taps = inputs(layout)
    assert_same(dit_accel.attention(q, k, v, pattern, layout), by_hand(q, k, v, None, layout, pattern))
    out = layer_of(layout, pattern, other=other)(call_of(layout, q, k, v, taps))
    assert_same(out[:, 0], dit_accel.attention(q, k, v, other, layout)[:, 0])
    assert_same(out[:, 1], by_hand(q, k, v, taps, layout, pattern)[:, 1])


def test_costs():
    layout = TokenLayout((2, 8, 8), 16)
    pattern = Agent((1, 4, 4))
    assert pattern.agents(layout) == 8
    assert pattern.density(layout) == (8 * (144 + 128) + 16 * 144) / 144**2
    few = Agent((1, 1, 2))  # as many products as dense attention
    assert (few.agents(layout), few.density(layout)) == (0, 1.0)
    q, k, v, _ = inputs(layout)
    dense = dit_accel.attention(q, k, v, Dense(), layout)
    assert torch.equal(dit_accel.attention(q, k, v, few, layout), dense)
    assert InLine().density(layout) == 1 - 128 / 144
    assert layer_of(layout, InLine()).pairs_beside(LayerSizes(16)) == 8 * (144 + 128) + 4.5 * 128


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_what_is_refused(pattern):
    layout = LAYOUTS["video"]
    q, k, v, _ = inputs(layout)
    with pytest.raises(UnavailableError, match="returns no lse"):
        dit_accel.attention(q, k, v, pattern, layout, return_lse=True)
    with pytest.raises(ValueError, match="for what it leaves out, and a tail would count that twice"):
        dit_accel.attention(q, k, v, pattern, layout, tail="pooled")
    with pytest.raises(
        ValueError, match="computed without the kernels that `quantization` is for, got 'int8'"
    ):
        dit_accel.attention(q, k, v, pattern, layout, quantization="int8")
    with pytest.raises(TypeError, match="has no mask before it sees queries and keys"):
        pattern.block_mask(layout)


def test_numeric_formats_are_refused_in_recipes(wan):
    with pytest.raises(ValueError, match="computed without the kernels that `quantization` is for"):
        dit_accel.enable(wan.pipe, Recipe(Agent(), quantization="int8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch": (1, 1, 1)}, r"`patch` must have more than one token, got \(1, 1, 1\)"),
        ({"patch": (4, 4)}, "`patch` must be 3 integers"),
        ({"exponent": 2}, "`exponent` must be a number from 0 to 1, got 2"),
        ({"shortcut": -0.1}, "`shortcut` must be a number from 0 to 1"),
    ],
)
def test_values_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Agent(**arguments)
