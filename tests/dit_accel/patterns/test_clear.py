import pytest
import torch

import dit_accel
from dit_accel import TokenLayout
from dit_accel.attention.arrangement import call_order
from dit_accel.attention.call import AttentionCall
from dit_accel.attention.functional import check_tail
from dit_accel.attention.layer_masks import LayerMasks, layer_attention
from dit_accel.patterns import ChunkCausal, Clear, Routed


@pytest.mark.parametrize(("radius", "keys"), [(8, 193), (16, 793), (32, 3205)])
def test_published_disc_sizes(radius, keys):
    mask = Clear(radius).token_mask(TokenLayout((1, 65, 65)))
    assert mask[32 * 65 + 32].sum() == keys


@pytest.mark.parametrize(("radius", "density"), [(8, 0.243316), (16, 0.332082), (32, 0.590642)])
def test_published_densities(radius, density):
    assert Clear(radius).density(TokenLayout((1, 64, 64), 512, text_first=True)) == pytest.approx(
        density, abs=1e-6
    )


def test_definition():
    layout, radius = TokenLayout((2, 5, 6), 3, text_first=True), 2.5
    mask = Clear(radius).token_mask(layout)
    for q in range(layout.seq_len):
        for k in range(layout.seq_len):
            inside = True
            if q >= 3 and k >= 3:
                dy = (q - 3) % 30 // 6 - (k - 3) % 30 // 6
                inside = dy**2 + ((q - 3) % 6 - (k - 3) % 6) ** 2 < radius**2
            assert mask[q, k] == inside


def test_a_wide_disc_covers_the_grid():
    assert Clear(100).density(TokenLayout((1, 8, 8))) == 1


@pytest.mark.parametrize("radius", [0, -3, "8", float("nan")])
def test_bad_radius(radius):
    with pytest.raises(ValueError, match="`radius` must be a positive number, got"):
        Clear(radius)


# -- pooled keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("downsample", [0, 1, 2.5, "4", True])
def test_bad_downsample(downsample):
    with pytest.raises(ValueError, match="`downsample` must be an integer of at least 2"):
        Clear(8, downsample=downsample)


def test_visual_tokens_alone_see_pooled_keys():
    layout, pattern = TokenLayout((2, 5, 6), 3, text_first=True), Clear(2, downsample=4)
    mask = pattern.token_mask(layout)
    assert mask.shape == (63, 63 + 8)  # 2 frames of 2 x 2 patches, of which most are cut
    assert torch.equal(mask[:, :63], Clear(2).token_mask(layout))
    assert mask[3:, 63:].all()
    assert not mask[:3, 63:].any()
    assert pattern.density(layout) == mask.double().mean().item()


def pooled(x: torch.Tensor, layout: TokenLayout, weights: torch.Tensor) -> torch.Tensor:
    """Patch by patch, as the paper has it; of a patch that is cut, by the weights of its tokens."""
    (frames, height, width), f = layout.grid, len(weights)
    grid, found = x[:, :, layout.visual_slice].unflatten(2, layout.grid), []
    for t in range(frames):
        for top in range(0, height, f):
            for left in range(0, width, f):
                patch = grid[:, :, t, top : top + f, left : left + f]
                own = weights[: patch.shape[2], : patch.shape[3]]
                found.append((patch * own[..., None]).sum((2, 3)) * weights.sum() / own.sum())
    return torch.stack(found, 2)


def dense(q, k, v, layout, pattern, weights, text_valid=None):
    k, v = (torch.cat([x, pooled(x, layout, weights)], 2) for x in (k, v))
    mask = pattern.token_mask(layout)[None]
    if text_valid is not None:
        hidden = torch.nn.functional.pad(layout.padding(text_valid), (0, pattern.pooled_keys(layout)))
        mask = mask & ~hidden[:, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])


@pytest.mark.parametrize("backend", ["reference", "gather", "native"])
@pytest.mark.parametrize(
    ("layout", "factor"),
    [
        (TokenLayout((1, 8, 12), 7, text_first=True), 4),
        (TokenLayout((1, 7, 9), 3), 4),
        (TokenLayout((2, 5, 6), 0), 3),
        (TokenLayout((1, 3, 2), 130), 4),  # one patch, larger than the grid
        (TokenLayout((1, 6, 6), 5, text_first=True, anchor=(1, 3, 3)), 2),
    ],
    ids=lambda x: f"{x.grid}-{x.text_len}" if isinstance(x, TokenLayout) else str(x),
)
def test_pooled_attention_is_the_dense_formula(layout, factor, backend):
    generator = torch.Generator().manual_seed(0)
    exact = torch.float64 if backend == "reference" else torch.float32
    q, k, v = (torch.randn(2, 2, layout.seq_len, 16, generator=generator).to(exact) for _ in range(3))
    valid = torch.tensor([layout.text_len, layout.text_len // 2]) if layout.text_len else None
    pattern, weights = (
        Clear(2.5, downsample=factor),
        torch.full((factor, factor), factor**-2.0, dtype=torch.float64),
    )
    own = dit_accel.attention(q, k, v, pattern, layout, text_valid=valid, backend=backend)
    expected = dense(q.double(), k.double(), v.double(), layout, pattern, weights, valid)
    plain = dense(q, k, v, layout, pattern, weights.to(exact), valid)
    error, least = (own - expected).abs().max(), (plain - expected).abs().max()
    assert error <= 2 * least + 16 * torch.finfo(exact).eps


def test_learned_weights_and_their_gradients():
    """In an order of calls that is not the model's own; the weights are those of the place in a patch."""
    layout, pattern = TokenLayout((1, 6, 7), 3, text_first=True), Clear(2, downsample=4)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, layout.seq_len, 16, generator=generator) for _ in range(3))
    weights = torch.rand(4, 4, generator=generator).requires_grad_()
    places = torch.randperm(layout.visual_len, generator=generator)
    order = call_order(layout, places)
    layer = layer_attention([pattern] * 2, LayerMasks(layout, "tile", (16, 16), "cpu", places))
    moved = [x[:, :, order] for x in (q, k, v)]
    call = AttentionCall(*moved, layout, dense=None, learned={"spatial_weight": weights})
    own = layer(call)[:, :, torch.argsort(order)]
    assert torch.allclose(own, dense(q, k, v, layout, pattern, weights), atol=1e-5)
    (found,) = torch.autograd.grad(own.square().sum(), weights)
    (right,) = torch.autograd.grad(dense(q, k, v, layout, pattern, weights).square().sum(), weights)
    assert torch.allclose(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("other", [Clear(3), Clear(2, downsample=2), Routed(top_k=0.3, block_size=(16, 16))])
def test_heads_of_other_patterns_beside_it(other):
    layout, mine = TokenLayout((1, 8, 8), 4), Clear(2, downsample=4)
    q, k, v = (
        torch.randn(1, 2, layout.seq_len, 16, generator=torch.Generator().manual_seed(i)) for i in (1, 2, 3)
    )
    masks = LayerMasks(layout, "raster", (16, 16), "cpu")
    call = AttentionCall(q, k, v, layout, dense=None)
    out = layer_attention([mine, other], masks)(call)
    for head, pattern in enumerate((mine, other)):
        alone = layer_attention([pattern], masks)(call.of_heads([head]))
        assert torch.allclose(out[:, [head]], alone, atol=1e-6)


def test_what_would_count_them_twice_is_refused():
    with pytest.raises(ValueError, match="has pooled keys for what it leaves out, and a tail would count"):
        check_tail("pooled", Clear(8, downsample=4))
    with pytest.raises(ValueError, match="of frames to come as well"):
        ChunkCausal(2, Clear(8, downsample=4))


def test_order_saves_blocks_at_2048x4096():
    """Tile and curve orders cut the non-empty blocks of CLEAR at this size by 2.3 to 3.1 times."""
    layout = TokenLayout((1, 128, 256), 512, text_first=True)
    savings = []
    for radius in (8, 16, 32):
        raster = Clear(radius).block_mask(layout, (128, 128), "raster")
        best = Clear(radius).block_mask(layout, (128, 128))
        savings.append(raster.block_density / best.block_density)
    assert all(2.3 <= saving <= 3.2 for saving in savings), savings
    assert torch.equal(best.order[-512:], torch.arange(512))
