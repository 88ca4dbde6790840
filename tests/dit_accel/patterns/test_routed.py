"""Routed: what it chooses against loops over samples, heads and blocks, in float64."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dit_accel import Recipe, TokenLayout, attention, kernels
from dit_accel.errors import UnavailableError
from dit_accel.masks import orders
from dit_accel.patterns import Clear, Neighborhood, Radial, Routed, SlidingTile

SPARGE = Routed(top_p=0.6, similarity=0.1, smooth_keys=True, block_size=(32, 16))
SETTINGS = {
    "biformer": Routed(top_k=0.3, block_size=(16, 16)),
    "sparge-cdf": SPARGE,
    "sparge-topk": dataclasses.replace(SPARGE, top_p=None, top_k=0.5, similarity=-0.1),
    "xattention": Routed(score="antidiagonal", stride=4, top_p=0.5, crossing=True, block_size=(16, 16)),
    "nabla": Routed(top_p=0.3, crossing=True, union=SlidingTile((1, 1, 3), (1, 2, 2)), block_size=(16, 16)),
    "sink": Routed(top_p=0.2, top_k=0.2, sink=True, block_size=(16, 8)),
}
LAYOUTS = {
    "video": TokenLayout((3, 6, 7)),
    "text-last": TokenLayout((2, 6, 8), 9),
    "text-first": TokenLayout((1, 9, 12), 16, True),
    "anchor": TokenLayout((1, 8, 8), 5, anchor=(1, 3, 4)),
    "short": TokenLayout((1, 3, 4), 20),
}


def inputs(layout, batch=2, heads=2, dim=16, seed=0):
    """q and k with neighbouring tokens alike, so that blocks differ in how alike their tokens are."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, layout.seq_len, dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    smooth = torch.linspace(0, 9, layout.seq_len, dtype=torch.float64)[:, None] + torch.arange(dim)
    return q + 2 * smooth.sin(), k + 2 * smooth.cos() + 1, v


def kept_of_row(weights, pattern) -> set[int]:
    """Of one row's weights the kept blocks, by the words of the docstring."""
    falling = sorted(range(len(weights)), key=lambda j: (-weights[j], j))
    count = 0 if pattern.top_k is None else max(1, int(pattern.top_k * len(weights)))
    if pattern.top_p is not None:
        total, mass, within = sum(weights), 0.0, 0
        for j in falling:
            mass += weights[j]
            if mass > pattern.top_p * total:
                break
            within += 1
        crossed = (
            pattern.crossing
            and within < len(weights)
            and mass - weights[falling[within]] < pattern.top_p * total
        )
        count = max(count, within + crossed, 1)
    return set(falling[:count])


def blocks_of(tokens: list[int], size: int) -> list[list[int]]:
    return [tokens[at : at + size] for at in range(0, len(tokens), size)]


def expected_mask(pattern, q, k, layout, order=None):
    """(B, H, S, S) by loops; only blocks of visual tokens are weighed."""
    visual = list(range(layout.visual_slice.start, layout.visual_slice.stop))
    visual = visual if order is None else [visual[int(i)] for i in order]
    others = [t for t in range(layout.seq_len) if t not in set(visual)]
    others.sort(key=lambda t: t < layout.visual_slice.start)  # anchor, then text
    rows, columns = (blocks_of(visual + others, size) for size in pattern.block_size)
    mask = torch.zeros(*q.shape[:2], layout.seq_len, layout.seq_len, dtype=torch.bool)
    whole = set(visual)
    weighed_rows, weighed = ([b for b in blocks if whole.issuperset(b)] for blocks in (rows, columns))
    near = None if pattern.union is None else pattern.union.token_mask(layout)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys = k[b, h].clone()
            own = [t for block in weighed for t in block]
            if pattern.smooth_keys:
                keys = keys - keys[own].mean(0)
            alike = [cosine(keys[block]) for block in weighed]
            unlike = {
                j
                for j, one in enumerate(alike)
                if pattern.similarity is not None and one <= pattern.similarity
            }
            for row in rows:
                for j, column in enumerate(columns):
                    if row not in weighed_rows or column not in weighed or (pattern.sink and j == 0):
                        mask[b, h, torch.tensor(row)[:, None], torch.tensor(column)] = True
                if row not in weighed_rows:
                    continue
                chosen = (
                    kept_of_row(weights_of(pattern, q[b, h], keys, row, weighed, unlike), pattern) | unlike
                )
                if pattern.similarity is not None and cosine(q[b, h][row]) <= pattern.similarity:
                    chosen = set(range(len(weighed)))
                for j, column in enumerate(columns):
                    at = torch.tensor(row)[:, None], torch.tensor(column)
                    if j in chosen or (near is not None and near[at].any()):
                        mask[(b, h, *at)] = True
    return mask


def cosine(x):
    unit = F.normalize(x, dim=-1)
    return (unit @ unit.T).mean().item()


def weights_of(pattern, q, k, row, columns, unlike):
    scale = q.shape[-1] ** -0.5
    if pattern.score == "mean":
        scores = [float(q[row].mean(0) @ k[c].mean(0)) * scale for c in columns]
        scores = [-math.inf if j in unlike else s for j, s in enumerate(scores)]
        return [0.0] * len(scores) if max(scores, default=-math.inf) == -math.inf else softmax(scores)
    stride, mass = pattern.stride, [0.0] * len(columns)
    for queries in blocks_of(row, stride):
        scores, of = [], []
        for j, column in enumerate(columns):
            for keys in blocks_of(column, stride):
                pairs = [(stride - 1 - n, n) for n in range(stride)]
                dots = [
                    float(q[queries[a]] @ k[keys[b]]) for a, b in pairs if a < len(queries) and b < len(keys)
                ]
                scores.append(sum(dots) * scale / stride)
                of.append(j)
        for j, p in zip(of, softmax(scores), strict=True):
            mass[j] += p
    return [0.0 if j in unlike else m for j, m in enumerate(mass)]


def softmax(scores):
    top = max(scores)
    powers = [math.exp(s - top) for s in scores]
    return [p / sum(powers) for p in powers]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_select_is_what_the_method_says(name, layout):
    pattern, (q, k, _) = SETTINGS[name], inputs(layout)
    mask = pattern.select(q, k, layout)
    mask.validate()
    order = pattern.token_order(layout)
    expected = expected_mask(pattern, q, k, layout, order)
    assert torch.equal(mask.to_token_mask(), expected)
    assert mask.density == pytest.approx(expected.double().mean().item(), abs=1e-12)
    assert mask.achieved_density().item() == pytest.approx(mask.density, abs=1e-12)


@pytest.mark.parametrize("order", ["raster", "tile", "hilbert", "random"])
def test_blocks_are_cut_in_any_token_order(order):
    layout, pattern = LAYOUTS["text-first"], Routed(top_k=0.3, block_size=(16, 16))
    if order == "random":
        order = torch.randperm(layout.visual_len, generator=torch.Generator().manual_seed(0))
    q, k, _ = inputs(layout)
    own = pattern.token_order(layout, order=order)
    assert torch.equal(own.sort().values, torch.arange(layout.visual_len))
    mask = pattern.select(q, k, layout, order=order).to_token_mask()
    assert torch.equal(mask, expected_mask(pattern, q, k, layout, own))


def test_named_orders_are_those_of_static_patterns():
    layout = TokenLayout((1, 8, 16))
    pattern, near = Routed(top_k=0.3), Neighborhood(3)
    assert torch.equal(pattern.token_order(layout), orders.raster(layout.grid))
    assert torch.equal(pattern.token_order(layout, order="hilbert"), orders.hilbert(layout.grid))
    assert torch.equal(
        Routed(top_k=0.3, block_size=(16, 16)).token_order(layout, order="tile"),
        orders.tiles(layout.grid, (1, 4, 4)),
    )
    union = Routed(top_k=0.3, union=near)
    assert torch.equal(union.token_order(layout), near.token_order(layout))


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name in SETTINGS for backend in ("native", "gather", "reference")],
)
def test_attention_is_dense_attention_under_what_was_chosen(name, backend, padded):
    layout = LAYOUTS["text-last"]
    pattern = dataclasses.replace(SETTINGS[name], block_size=(32, 16))
    q, k, v = inputs(layout)
    text_valid = torch.tensor([4, 9]) if padded else None
    mask = pattern.select(q, k, layout, text_valid=text_valid).to_token_mask()
    if padded:
        mask = mask & ~layout.padding(text_valid)[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    plain = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).double()
    qkv = (x.float() for x in (q, k, v))
    actual = attention(*qkv, pattern, layout, text_valid=text_valid, backend=backend)
    assert not mask.all()
    assert (actual - expected).abs().max() <= 2 * (plain - expected).abs().max() + 1e-7 * expected.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("pattern", [Routed(top_k=1.0), Routed(top_p=1.0, crossing=True)], ids=["k", "p"])
def test_all_blocks_kept_is_dense(pattern, layout):
    q, k, v = inputs(layout)
    out, lse = attention(q, k, v, pattern, layout, return_lse=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, (q @ k.mT / 4).logsumexp(-1), rtol=0, atol=1e-12)


@given(
    st.builds(
        TokenLayout, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), st.integers(0, 20)
    ),
    st.one_of(st.tuples(st.floats(0.05, 1), st.none()), st.tuples(st.none(), st.floats(0.05, 1))),
    st.booleans(),
    st.sampled_from([None, -0.5, 0.2, 1.0]),
    st.sampled_from([(16, 8), (32, 16), (16, 48)]),
    st.sampled_from(["raster", "tile", "hilbert"]),
)
@settings(max_examples=25, deadline=None)
def test_any_layout_in_any_smaller_blocks(layout, shares, crossing, similarity, size, order):
    pattern = Routed(*shares, crossing, similarity, smooth_keys=True, block_size=size)
    q, k, _ = inputs(layout, 1, 2, 8)
    masks = {bs: pattern.select(q, k, layout, order=order, block_size=bs) for bs in (None, (16, 8))}
    for mask in masks.values():
        mask.validate()
    whole, smaller = (mask.to_token_mask() for mask in masks.values())
    assert torch.equal(whole, smaller)
    own = pattern.token_order(layout, order=order)
    assert torch.equal(whole, expected_mask(pattern, q, k, layout, own))
    assert whole.any(-1).all()


def test_density_is_what_it_aims_at():
    layout = TokenLayout((4, 8, 16), 64)
    q, k, _ = inputs(layout)
    top_k = Routed(top_k=0.25, block_size=(64, 64))
    assert top_k.select(q, k, layout).density == pytest.approx(top_k.density(layout), abs=1e-12)
    top_p = Routed(top_p=0.5, block_size=(64, 64))
    assert top_p.select(q, k, layout).density <= top_p.density(layout) + 1e-12
    union = Routed(top_k=0.25, block_size=(64, 64), union=Radial(0.2, block_size=64))
    assert union.density(layout) >= max(top_k.density(layout), 0.9 * union.union.density(layout))


@pytest.mark.parametrize("name", SETTINGS)
def test_recipes_are_written_and_read(name):
    recipe = Recipe(SETTINGS[name])
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert SETTINGS[name] == eval(repr(SETTINGS[name]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`top_k`"),
        ({"top_k": 0}, "`top_k` must be a number above 0"),
        ({"top_p": 1.5}, "`top_p` must be a number above 0"),
        ({"top_k": 0.5, "score": "max"}, "`score` must be 'mean' or 'antidiagonal'"),
        ({"top_k": 0.5, "score": "antidiagonal", "stride": 12}, "`stride` must divide"),
        ({"top_k": 0.5, "similarity": math.nan}, "`similarity` must be a number"),
        ({"top_k": 0.5, "refresh": 0}, "`refresh` must be a positive integer"),
        ({"top_k": 0.5, "union": "sta"}, "`union` must be a static pattern"),
        ({"top_k": 0.5, "block_size": (100, 64)}, "`block_size`"),
        ({"top_k": 0.5, "pv_threshold": -1}, "`pv_threshold` must be a number above 0 or None, got -1"),
        ({"top_k": 0.5, "crossing": 1}, "`crossing` must be True or False"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Routed(**arguments)


def test_values_that_are_not_added():
    """`pv_threshold` reaches the kernel, in a recipe's layer as in the function; no backend ignores it."""
    layout = TokenLayout((1, 16, 16))
    q, k, v = (x.float() for x in inputs(layout))
    q[..., 0] += 4
    k[..., :64, 0] += 8  # which all queries look at
    plain, skipping = (Routed(top_k=1, block_size=(64, 64), pv_threshold=t) for t in (None, 1.0))
    outs = [attention(q, k, v, one, layout, backend="reference") for one in (plain, skipping)]
    assert (outs[0] - outs[1]).abs().max() > 1e-3
    always = Routed(top_k=1, block_size=(64, 64), pv_threshold=200)
    torch.testing.assert_close(attention(q, k, v, always, layout), outs[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(UnavailableError, match="gather does not skip values; use pv_threshold=None"):
        attention(q, k, v, skipping, layout, backend="gather")


def test_what_is_not_available_is_refused():
    layout = TokenLayout((1, 8, 8))
    with pytest.raises(ValueError, match="`union` must attend to tokens alone"):
        Routed(top_k=0.5, union=Pooled()).density(layout)
    with pytest.raises(ValueError, match=r"`block_size` \(64, 64\) must divide the blocks"):
        Routed(top_k=0.5, block_size=(32, 64)).select(*inputs(layout)[:2], layout, block_size=(64, 64))


@dataclasses.dataclass(frozen=True)
class Pooled(Clear):
    """A pattern with pooled keys."""

    radius: float = 3

    def pooled_keys(self, layout):
        return 4


def test_a_choice_is_made_on_the_device():
    """Nothing of a call is asked back: on the meta device, which has no values, it runs."""
    layout = TokenLayout((2, 8, 8), 16)
    for pattern in SETTINGS.values():
        q, k = (torch.empty(2, 3, layout.seq_len, 16, device="meta") for _ in range(2))
        mask = pattern.select(q, k, layout)
        assert mask.device.type == "meta"
        assert mask.achieved_density().shape == ()


def test_kernels_get_the_blocks_that_suit_them():
    layout, q = TokenLayout((2, 8, 8)), torch.randn(1, 1, 128, 16)
    assert kernels.default_block_size("cpu")[0] == 64
    out = attention(q, q, q, Routed(top_k=1.0, block_size=(48, 32)), layout)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q))
