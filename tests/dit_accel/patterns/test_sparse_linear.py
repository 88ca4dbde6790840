"""Sparse-linear attention against loops over blocks in float64: both forms, orders, text, gradients."""

import pytest
import torch
import torch.nn.functional as F

import dit_accel
from dit_accel import TokenLayout, UnavailableError
from dit_accel.attention import sparse_linear
from dit_accel.attention.arrangement import call_order
from dit_accel.attention.call import AttentionCall, LayerSizes
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.masks import orders
from dit_accel.patterns import ByNoise, Dense, Neighborhood, Routed, SparseLinear

SIZE = (16, 8)
LAYOUTS = {
    "video": TokenLayout((3, 5, 7)),
    "text-last": TokenLayout((2, 6, 8), 9),
    "text-first": TokenLayout((1, 8, 12), 16, True),
    "anchor": TokenLayout((1, 8, 8), 5, anchor=(1, 3, 4)),
    "short": TokenLayout((1, 3, 4), 20),
}
MAPS = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": lambda x: x.clamp(min=0)}
FORMS = {
    "complement": SparseLinear(0.3, block_size=SIZE),
    "complement-elu": SparseLinear(0.2, feature_map="elu", block_size=SIZE, negligible=0.3),
    "all": SparseLinear(0.3, form="all", block_size=SIZE),
    "all-relu": SparseLinear(0.1, form="all", feature_map="relu", block_size=SIZE),
    "everything": SparseLinear(1, block_size=SIZE),
}


def inputs(layout, seed=0, batch=2, heads=2, dim=16):
    """q, k, v, and the projection's weight and bias, float64; keys have an offset in common."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, layout.seq_len, dim, generator=generator, dtype=torch.float64)
    weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((dim, dim), (dim,))
    )
    return q, k + 5, v, weight, bias


def one_head(q, k, v, weight, bias, layout, pattern, visual, hidden):
    """The output (S, D) of one sample and head, by the words; `visual` is the order of visual tokens."""
    first, phi = layout.visual_slice.start, MAPS[pattern.feature_map]
    tokens = [first + int(i) for i in visual]
    others = sorted(set(range(layout.seq_len)) - set(tokens), key=lambda t: (t < first, t))
    own, tokens = set(tokens), tokens + others
    rows, columns = ([tokens[i : i + n] for i in range(0, len(tokens), n)] for n in SIZE)
    chosen = [column for column in columns if own.issuperset(column)]
    real = [t for t in range(layout.seq_len) if not hidden[t]]
    out = torch.empty_like(q)
    for row in rows:
        judged = own.issuperset(row)
        scores = [(q[row].mean(0) @ k[column].mean(0)).item() for column in chosen]
        ranked = sorted(range(len(chosen)), key=lambda j: -scores[j])
        critical = ranked[: max(1, int(pattern.top_k * len(chosen)))] if judged else ranked
        left = ranked[len(critical) :]
        marginal = left[: len(left) - min(len(left), int(pattern.negligible * len(chosen)))]
        seen = [t for j in critical for t in chosen[j]] + [t for c in columns if c not in chosen for t in c]
        seen = [t for t in seen if not hidden[t]]
        out[row] = (q[row] @ k[seen].T * q.shape[1] ** -0.5).softmax(-1) @ v[seen]
        if not judged:
            continue
        linear = real if pattern.form == "all" else [t for j in marginal for t in chosen[j]]
        weights = phi(q[row]) @ phi(k[linear]).T
        below = weights.sum(1, keepdim=True) + (1e-5 if pattern.form == "all" else 0)
        out[row] = out[row] + (weights @ v[linear] / below).nan_to_num(0) @ weight.T + bias
    return out


def by_hand(q, k, v, weight, bias, layout, pattern, visual=None, valid=None):
    visual = orders.raster(layout.grid) if visual is None else visual
    none = torch.zeros(len(q), layout.seq_len, dtype=torch.bool)
    hidden = none if valid is None else layout.padding(valid)
    heads = [
        [
            one_head(q[b, h], k[b, h], v[b, h], weight, bias, layout, pattern, visual, hidden[b])
            for h in (0, 1)
        ]
        for b in range(len(q))
    ]
    return torch.stack([torch.stack(own) for own in heads])


def layer_of(layout, pattern, order="auto", places=None):
    return layer_attention([pattern] * 2, LayerMasks(layout, order, (16, 8), torch.device("cpu"), places))


def call_of(layout, q, k, v, weight, bias, **options):
    learned = {"proj_l.weight": weight, "proj_l.bias": bias}
    return AttentionCall(q, k, v, layout, dense=None, learned=learned, **{"backend": "reference", **options})


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("pattern", FORMS.values(), ids=FORMS)
def test_it_is_the_formula(layout, pattern, monkeypatch):
    """Also where the sums over blocks do not fit into memory at a time."""
    valid = torch.tensor([layout.text_len, layout.text_len // 2]) if layout.text_len else None
    given = inputs(layout)
    expected = by_hand(*given, layout, pattern, valid=valid)
    call = call_of(layout, *given, text_valid=valid)
    layer = layer_of(layout, pattern)
    torch.testing.assert_close(layer(call), expected, rtol=0, atol=1e-11)
    monkeypatch.setattr(sparse_linear, "_NUMBERS_AT_ONCE", 1)
    torch.testing.assert_close(layer(call), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(layer.resolved(call)(call), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", ["complement", "all"])
def test_orders_of_calls_and_of_blocks_are_none_of_its_business(form):
    layout, pattern = LAYOUTS["text-first"], SparseLinear(0.3, form=form, block_size=SIZE)
    given = inputs(layout, 1)
    visual = orders.tiles(layout.grid, (1, 4, 4))
    places = torch.randperm(layout.visual_len, generator=torch.Generator().manual_seed(0))
    order = call_order(layout, places)
    call = call_of(layout, *(x[:, :, order] for x in given[:3]), *given[3:])
    out = layer_of(layout, pattern, visual, places)(call)[:, :, torch.argsort(order)]
    torch.testing.assert_close(out, by_hand(*given, layout, pattern, visual), rtol=0, atol=1e-11)


@pytest.mark.parametrize("pattern", [FORMS["complement"], FORMS["all"], FORMS["all-relu"]])
def test_gradients(pattern):
    """Of all that is given and of what is learned; the choice has none."""
    layout = LAYOUTS["text-last"]
    mine, theirs = ([x.clone().requires_grad_() for x in inputs(layout)] for _ in range(2))
    layer_of(layout, pattern)(call_of(layout, *mine)).square().sum().backward()
    by_hand(*theirs, layout, pattern).square().sum().backward()
    for own, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own.grad, right.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["complement", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_short_numbers_on_the_cpus_kernel(form, dtype):
    """Off float64 by little more than rounding its result is; autocast changes nothing."""
    layout, pattern = LAYOUTS["video"], SparseLinear(0.3, form=form, block_size=SIZE)
    q, k, v, weight, bias = inputs(layout, 2)
    q, k, v = ((x / 3).to(dtype) for x in (q, k - 5, v))
    call = call_of(layout, q, k, v, weight.float(), bias.float(), backend="auto")
    out = layer_of(layout, pattern)(call)
    assert out.dtype == dtype
    expected = by_hand(
        *(x.double() for x in (q, k, v)), weight.float().double(), bias.float().double(), layout, pattern
    )
    least = (expected.to(dtype).double() - expected).abs().max()
    assert (out.double() - expected).abs().max() <= 4 * least + 16 * torch.finfo(torch.float32).eps
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer_of(layout, pattern)(call), out)


def test_without_a_projection_only_critical_blocks_count():
    layout, (q, k, v, *_) = LAYOUTS["text-last"], inputs(LAYOUTS["text-last"])
    for pattern in FORMS.values():
        plain = Routed(top_k=pattern.top_k, block_size=SIZE)
        own = dit_accel.attention(q, k, v, pattern, layout, return_lse=True)
        expected = dit_accel.attention(q, k, v, plain, layout, return_lse=True)
        for one, other in zip(own, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert pattern.density(layout) == plain.density(layout)
        assert torch.equal(
            pattern.select(q, k, layout).to_token_mask(), plain.select(q, k, layout).to_token_mask()
        )


def test_beside_heads_of_another_pattern():
    layout, other, pattern = LAYOUTS["video"], Neighborhood((3, 3, 3)), FORMS["complement"]
    given = inputs(layout)
    layer = layer_attention([other, pattern], LayerMasks(layout, "raster", SIZE, torch.device("cpu")))
    out = layer(call_of(layout, *given))
    expected = dit_accel.attention(*given[:3], other, layout)
    torch.testing.assert_close(out[:, 0], expected[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(out[:, 1], by_hand(*given, layout, pattern)[:, 1], rtol=0, atol=1e-11)


def test_what_is_learned_and_what_is_refused():
    pattern, layout = SparseLinear(block_size=SIZE), LAYOUTS["video"]
    assert {name: tuple(x.shape) for name, x in pattern.learned(LayerSizes(8)).items()} == {
        "proj_l.weight": (8, 8),
        "proj_l.bias": (8,),
    }
    assert not any(x.any() for x in pattern.learned(LayerSizes(8)).values())
    given = inputs(layout)
    with pytest.raises(UnavailableError, match="returns no lse"):
        layer_of(layout, pattern).with_lse(call_of(layout, *given))
    with pytest.raises(ValueError, match="has linear attention for what it leaves out, and a tail"):
        dit_accel.attention(*given[:3], ByNoise({0.5: Dense(), 0: pattern}), layout, tail="pooled", sigma=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "`top_k` must be a number above 0 and at most 1, got 0"),
        ({"form": "rest"}, "`form` must be 'complement' or 'all', got 'rest'"),
        ({"feature_map": "exp"}, "`feature_map` must be 'softmax', 'elu' or 'relu', got 'exp'"),
        ({"block_size": (60, 64)}, "block_size"),
        ({"negligible": 1}, "`negligible` must be a number from 0 to below 1, got 1"),
        ({"negligible": 0.1, "form": "all"}, "is for the form 'complement', got 0.1 with form='all'"),
    ],
)
def test_values_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseLinear(**arguments)
