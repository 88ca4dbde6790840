"""Clustered: k-means, choice and cover of blocks against loops, in float64; warm starts in runs."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dit_accel import Recipe, TokenLayout, attention, presets
from dit_accel.attention import clustered, kmeans, online
from dit_accel.patterns import Clustered
from dit_accel.runtime.switching import accelerated

PATTERN = Clustered(6, 9, 0.4, 0.15, (4, 1))
LAYOUTS = {
    "video": TokenLayout((3, 6, 7)),
    "text-last": TokenLayout((2, 6, 8), 9),
    "text-first": TokenLayout((1, 9, 12), 16, True),
    "anchor": TokenLayout((1, 8, 8), 5, anchor=(1, 3, 4)),
    "short": TokenLayout((1, 1, 3), 20),
}


def inputs(layout, batch=2, heads=2, dim=16):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, heads, layout.seq_len, dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return 2 * q, 2 * k, v


def clusters(x, starts, iterations):
    """Labels and means of one head's tokens, by Lloyd's algorithm in loops."""
    centroids = [x[at].clone() for at in starts]
    for _ in range(iterations):
        labels = [
            min(range(len(centroids)), key=lambda i: float((t - centroids[i]).square().sum())) for t in x
        ]
        for i in range(len(centroids)):
            own = [t for t, label in zip(x, labels, strict=True) if label == i]
            centroids[i] = torch.stack(own).mean(0) if own else centroids[i]
    return labels, centroids


def expected_mask(pattern, q, k, layout, block_size):
    """(B, H, S, S): what SVG2 keeps, and in whole blocks of tokens that stand cluster by cluster."""
    visual = layout.visual_slice
    drawn = [[int(t) - visual.start for t in one] for one in pattern.drawn(layout)]
    others = layout.text_last[layout.visual_len :].tolist()
    pairs, mask = (
        torch.zeros(*q.shape[:2], layout.seq_len, layout.seq_len, dtype=torch.bool) for _ in range(2)
    )
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            (q_labels, q_means), (k_labels, k_means) = (
                clusters(x[b, h, visual], start, pattern.iterations[0])
                for x, start in zip((q, k), drawn, strict=True)
            )
            sizes = [k_labels.count(j) for j in range(len(k_means))]
            keeps = []
            for mean in q_means:
                weights = [
                    n * math.exp(float(mean @ c) / q.shape[-1] ** 0.5)
                    for n, c in zip(sizes, k_means, strict=True)
                ]
                falling = sorted(range(len(weights)), key=lambda j: (-weights[j], j))
                mass, count = 0.0, 0
                while count < len(falling) and mass < pattern.top_p * sum(weights):
                    mass, count = mass + weights[falling[count]], count + 1
                keeps.append(set(falling[: max(count, 1, int(pattern.least * len(weights)))]))
            for i, row in enumerate(q_labels):
                for j, column in enumerate(k_labels):
                    pairs[b, h, visual.start + i, visual.start + j] = column in keeps[row]
            pairs[b, h, others] = True
            pairs[b, h, :, others] = True
            rows, columns = (
                torch.tensor(
                    [visual.start + t for t in sorted(range(len(labels)), key=lambda t: labels[t])] + others
                )
                for labels in (q_labels, k_labels)
            )
            for r in rows.split(block_size[0]):
                for c in columns.split(block_size[1]):
                    mask[b, h, r[:, None], c] = pairs[b, h, r[:, None], c].any()
    return pairs, mask


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("block_size", [(16, 8), (16, 48)], ids=str)
def test_select_is_what_the_method_says(layout, block_size):
    q, k, _ = inputs(layout)
    mask = PATTERN.select(q, k, layout, block_size=block_size)
    mask.validate()
    pairs, expected = expected_mask(PATTERN, q, k, layout, block_size)
    assert torch.equal(mask.to_token_mask(), expected)
    assert not (pairs & ~expected).any()
    assert mask.achieved_density().item() == pytest.approx(expected.double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("backend", ["native", "gather", "reference"])
def test_attention_is_dense_attention_under_what_was_chosen(backend, padded):
    layout = LAYOUTS["text-last"]
    q, k, v = inputs(layout)
    text_valid = torch.tensor([4, 9]) if padded else None
    qkv = [x.float() for x in (q, k, v)]
    mask = PATTERN.select(*qkv[:2], layout, block_size=(64, 16)).to_token_mask()
    if padded:
        mask = mask & ~layout.padding(text_valid)[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    plain = F.scaled_dot_product_attention(*qkv, attn_mask=mask).double()
    actual, lse = attention(*qkv, PATTERN, layout, text_valid=text_valid, backend=backend, return_lse=True)
    assert not mask.all()
    assert (actual - expected).abs().max() <= 2 * (plain - expected).abs().max() + 1e-7 * expected.abs().max()
    exact = (q @ k.mT / 4).masked_fill(~mask, -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_all_clusters_kept_is_dense(layout):
    q, k, v = inputs(layout)
    out = attention(q, k, v, Clustered(6, 9, top_p=1.0, least=1.0), layout)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-12)


@given(
    st.builds(
        TokenLayout, st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)), st.integers(0, 20)
    ),
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0.05, 1),
)
@settings(max_examples=25, deadline=None)
def test_any_layout_and_number_of_clusters(layout, queries, keys, top_p):
    pattern = Clustered(queries, keys, top_p, 0.1, (2, 1))
    q, k, _ = inputs(layout, 1, 1, 8)
    mask = pattern.select(q, k, layout, block_size=(16, 16))
    mask.validate()
    assert torch.equal(mask.to_token_mask(), expected_mask(pattern, q, k, layout, (16, 16))[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tokens_of_equal_centroids_go_to_the_first_however_products_round(monkeypatch, dtype):
    """Those of a token drawn twice stay equal while one cluster is that token alone, the other empty."""
    nearest = kmeans.nearest

    def rounding(x, centroids):
        """The last of equals, as matrix products may have it."""
        equal = (centroids[:, :, None] == centroids[:, :, :, None]).all(-1).int()
        last = equal.shape[2] - 1 - equal.flip(-1).argmax(-1)
        return last.gather(2, nearest(x, centroids))

    monkeypatch.setattr(kmeans, "nearest", rounding)
    x = torch.tensor([0.0, 0.1, 0.2, 9.0, 7.0], dtype=dtype).view(1, 1, 5, 1).expand(1, 1, 5, 4)
    found = kmeans.kmeans(x, x[:, :, [3, 0, 3, 4, 3]], 3)
    assert found.labels.tolist() == [[[1, 1, 1, 0, 3]]]
    assert found.sizes.tolist() == [[[1, 3, 0, 1, 0]]]


def test_equal_centroids_are_found():
    x = torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(0))
    at = torch.randint(40, (2, 3, 60), generator=torch.Generator().manual_seed(1))
    centroids = x.gather(2, at[..., None].expand(-1, -1, -1, 8))
    expected = (at[..., None] == at[:, :, None]).int().argmax(-1)
    assert torch.equal(kmeans.first_equal(centroids), expected)
    assert torch.equal(kmeans.first_equal(x), torch.arange(40).expand(2, 3, 40))


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_later_steps_start_from_the_previous_executed_one(family, request, monkeypatch):
    """Of the same layer and branch: few iterations then, and the centroids that the step before left."""
    case, calls = request.getfixturevalue(family), []
    original = clustered.kmeans

    def spied(x, centroids, iterations):
        found = original(x, centroids, iterations)
        calls.append((centroids, iterations, found.centroids))
        return found

    monkeypatch.setattr(clustered, "kmeans", spied)
    with accelerated(case.pipe, Recipe(PATTERN, dense_steps={1})):
        first = case.run(case.pipe, steps=4, cfg=3.0)
        seen = list(calls)
        assert torch.equal(case.run(case.pipe, steps=4, cfg=3.0), first)
    steps = [seen[at : at + len(seen) // 3] for at in range(0, len(seen), len(seen) // 3)]
    assert {iterations for _, iterations, _ in steps[0]} == {4}
    for before, after in pairwise(steps):
        for (_, _, left), (start, iterations, _) in zip(before, after, strict=True):
            assert iterations == 1
            assert torch.equal(start, left)


def test_token_orders_change_nothing(wan, monkeypatch):
    """Tokens that start a cluster are the model's, wherever calls have them."""
    masks = []
    original = online.tell
    monkeypatch.setattr(
        online, "tell", lambda call, mask: masks.append(mask.to_token_mask()) or original(call, mask)
    )
    for order in ("raster", "hilbert"):
        recipe = Recipe(
            {"0": Clustered(6, 9, 0.4, 0.15, (4, 1)), "1": near()}, order=order, block_size=(16, 8)
        )
        with accelerated(wan.pipe, recipe) as handle:
            wan.run(wan.pipe, steps=1)
            assert (handle.token_order() is None) == (order == "raster")
    sizes = [mask.double().mean().item() for mask in masks]
    assert sizes[0] == pytest.approx(sizes[1], abs=0.02)  # blocks cut clusters of other orders inside


def near():
    from dit_accel.patterns import Neighborhood

    return Neighborhood(3)


def test_recipes_are_written_and_read():
    assert Recipe.from_yaml(Recipe(PATTERN).to_yaml()) == Recipe(PATTERN)
    assert presets("wan")["wan-svg2"].attention == Clustered(300, 1000, 0.9, 0.1, (50, 2))
    assert presets("hunyuan-video")["hunyuan-video-svg2"].attention.query_clusters == 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_clusters": 0}, "`query_clusters` must be a positive integer"),
        ({"key_clusters": 2.5}, "`key_clusters` must be a positive integer"),
        ({"top_p": 0}, "`top_p` must be a number above 0"),
        ({"least": 1.5}, "`least` must be a number above 0"),
        ({"iterations": (0, 2)}, "`iterations` must be 2 integers"),
        ({"iterations": 3}, "`iterations` must be 2 integers"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Clustered(**arguments)


def test_a_choice_is_made_on_the_device():
    """Nothing of a call is asked back: on the meta device, which has no values, it runs."""
    layout = TokenLayout((2, 8, 8), 16)
    q, k = (torch.empty(2, 3, layout.seq_len, 16, device="meta") for _ in range(2))
    assert PATTERN.select(q, k, layout).device.type == "meta"
