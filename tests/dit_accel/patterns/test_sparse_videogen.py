import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import SparseVideoGen, SpatialHead, TemporalHead, sparse_videogen

LAYOUT = TokenLayout((6, 4, 8), 5)


@pytest.mark.parametrize(
    ("layout", "frames"),
    [(TokenLayout((21, 30, 52)), 2.81347), (TokenLayout((33, 45, 80), 256), 4.34869)],
    ids=["wan", "hunyuan-video"],
)
def test_published_band_widths(layout, frames):
    assert SpatialHead(0.25).frames(layout) == pytest.approx(frames, abs=1e-5)


@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("inclusive", [False, True], ids=["strict", "inclusive"])
def test_definition(sink, inclusive):
    frames, height, width = 6, 8, 12
    layout = TokenLayout((frames, height, width), 5)
    spatial, temporal = (kind(0.6, sink, inclusive) for kind in (SpatialHead, TemporalHead))
    reach = spatial.reach(layout)
    assert 0 < reach < layout.visual_len
    place = torch.arange(layout.visual_len)
    band = (place[:, None] - place).abs() <= reach
    if sink:
        band |= place < height * width
    assert torch.equal(spatial.rule(layout).mask(), band)
    by_place = place.view(frames, height, width).permute(1, 2, 0).flatten()  # place-major order of the tokens
    permuted = temporal.rule(layout).mask()[by_place][:, by_place]
    assert torch.equal(permuted, band)


@pytest.mark.parametrize("kind", [SpatialHead, TemporalHead])
@pytest.mark.parametrize("order", ["raster", "auto"])
def test_block_mask_is_exact(kind, order):
    layout, pattern = TokenLayout((6, 8, 12), 5), kind(0.6, True, True)
    mask = pattern.block_mask(layout, (32, 16), order)
    assert torch.equal(mask.to_token_mask(), pattern.token_mask(layout))
    assert pattern.density(layout) == pytest.approx(mask.density, abs=1e-12)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`keep` must be a number above 0"):
        SpatialHead(0)
    with pytest.raises(ValueError, match="`block_size` must be a positive integer, got 0"):
        TemporalHead(block_size=0)
    with pytest.raises(ValueError, match="less than the 100 text tokens alone take"):
        TemporalHead(0.2).rule(TokenLayout((2, 4, 4), 100))
    with pytest.raises(ValueError, match="less than one block of 128 tokens, so that nothing is attended"):
        SpatialHead(0.25).rule(TokenLayout((4, 4, 8)))


class TestOnlineChoice:
    def coarse(self, pattern, layout, queries) -> torch.Tensor:
        """The definition, token by token: (2, n, V)."""
        frames, height, width = layout.grid
        tokens = [(f, h, w) for f in range(frames) for h in range(height) for w in range(width)]
        spatial = {token: i for i, token in enumerate(tokens)}
        temporal = {token: i for i, token in enumerate(sorted(tokens, key=lambda t: (t[1], t[2], t[0])))}
        reach, frame = int(pattern.profile_frames * height * width / pattern.block_size), height * width
        masks = torch.zeros(2, len(queries), len(tokens), dtype=torch.bool)
        for kind, place in enumerate((spatial, temporal)):
            for i, query in enumerate(queries):
                for j, key in enumerate(tokens):
                    blocks = [place[t] // pattern.block_size for t in (tokens[query], key)]
                    near = abs(blocks[0] - blocks[1]) < reach
                    masks[kind, i, j] = near or (pattern.first_frame_sink and place[key] < frame)
        return masks

    @pytest.mark.parametrize(("sink", "frames", "size"), [(True, 2, 16), (False, 1.5, 10), (False, 1, 32)])
    def test_coarse_masks(self, sink, frames, size):
        pattern = SparseVideoGen(0.6, sink, block_size=size, profile_frames=frames)
        queries = pattern.sampled(LAYOUT, step=3)
        masks = pattern.coarse_masks(LAYOUT, pattern.places(LAYOUT), queries)
        assert torch.equal(masks, self.coarse(pattern, LAYOUT, queries.tolist()))

    def test_published_reach(self):
        assert SparseVideoGen(profile_frames=2).coarse_reach(TokenLayout((21, 30, 52))) == 24
        assert SparseVideoGen(profile_frames=1.5).coarse_reach(TokenLayout((33, 45, 80), 256)) == 42

    def test_places_are_those_of_the_static_heads(self):
        """In a head's own order, either kind is the mask that all heads compute."""
        pattern = SparseVideoGen(0.6, True, True, block_size=16)
        band = pattern.head_mask(LAYOUT, (16, 8)).to_token_mask()
        text = torch.arange(LAYOUT.visual_len, LAYOUT.seq_len)
        for head, places in zip((pattern.spatial, pattern.temporal), pattern.places(LAYOUT), strict=True):
            own = torch.cat([places, text])
            assert torch.equal(head.token_mask(LAYOUT), band[own][:, own])
            assert pattern.density(LAYOUT) == head.density(LAYOUT)

    @pytest.mark.parametrize("at_once", [1, 1 << 30], ids=["head-by-head", "all-heads"])
    def test_choice_is_the_smaller_error(self, at_once, monkeypatch):
        monkeypatch.setattr(sparse_videogen, "_PROFILE_BYTES", at_once)
        generator = torch.Generator().manual_seed(0)
        q, k, v = (2 * torch.randn(2, 6, LAYOUT.seq_len, 8, generator=generator) for _ in range(3))
        pattern = SparseVideoGen(0.6, True, block_size=16, profile_frames=2)
        queries = pattern.sampled(LAYOUT, step=0)
        masks = torch.ones(2, 64, LAYOUT.seq_len, dtype=torch.bool)
        masks[:, :, : LAYOUT.visual_len] = self.coarse(pattern, LAYOUT, queries.tolist())
        hidden = torch.zeros(2, LAYOUT.seq_len, dtype=torch.bool)
        hidden[1, -3:] = True
        temporal, margins = pattern.are_temporal(q, k, v, queries, masks, hidden), []
        for b in range(2):
            for h in range(6):
                scores = (q[b, h, queries].double() @ k[b, h].double().T) / 8**0.5
                scores[:, hidden[b]] = -torch.inf
                full = scores.softmax(1) @ v[b, h].double()
                spatial, other = (
                    ((scores.where(mask, -torch.inf).softmax(1) @ v[b, h].double() - full) ** 2).mean()
                    for mask in masks
                )
                assert temporal[b, h] == (other < spatial)
                margins.append(float((other - spatial).abs() / spatial))
        assert 0 < temporal.sum() < 12
        assert min(margins) > 1e-5  # no head whose kind is a matter of rounding

    @pytest.mark.parametrize("step", [0, 7])
    def test_known_heads_are_found(self, step):
        """Heads that look at their own frame, and heads that look at their own place in all frames."""
        frame, place = torch.arange(192) // 32, torch.arange(192) % 32
        kinds = torch.tensor([[True, False, False, True], [False, True, False, True]])
        codes = torch.stack([torch.eye(32)[frame], torch.eye(32)[place]])[kinds.long()]
        qk = torch.cat([5 * codes, torch.zeros(2, 4, LAYOUT.text_len, 32)], 2)
        v = torch.randn(qk.shape, generator=torch.Generator().manual_seed(0))
        pattern = SparseVideoGen(0.6, block_size=16, profile_frames=1)
        queries = pattern.sampled(LAYOUT, step)
        masks = torch.ones(2, 64, LAYOUT.seq_len, dtype=torch.bool)
        masks[:, :, :192] = pattern.coarse_masks(LAYOUT, pattern.places(LAYOUT), queries)
        assert torch.equal(pattern.are_temporal(qk, qk, v, queries, masks), kinds)

    def test_samples_depend_on_seed_and_step_alone(self):
        before = torch.get_rng_state()
        samples = [SparseVideoGen(seed=seed).sampled(LAYOUT, step) for seed in (0, 1) for step in (0, 1)]
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(SparseVideoGen(0.6, seed=1).sampled(LAYOUT, 1), samples[3])
        assert all(s.shape == (64,) and s.min() >= 0 and s.max() < LAYOUT.visual_len for s in samples)
        assert len({tuple(s.tolist()) for s in samples}) == 4

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"keep": 0}, "`keep` must be a number above 0"),
            ({"block_size": 0}, "`block_size` must be a positive integer, got 0"),
            ({"profile_frames": -1}, "`profile_frames` must be a positive number, got -1"),
            ({"rows": 0}, "`rows` must be a positive integer, got 0"),
            ({"seed": -1}, "`seed` must be an integer of at least 0"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            SparseVideoGen(**arguments)

    def test_layouts_that_do_not_suit(self):
        image = TokenLayout((1, 64, 64))
        for use in (SparseVideoGen().density, SparseVideoGen().head_mask, SparseVideoGen().places):
            with pytest.raises(ValueError, match=r"grid \(1, 64, 64\) has one frame; use another pattern"):
                use(image)
        with pytest.raises(ValueError, match=r"`profile_frames` 1.5 .* less than one block of 128 tokens"):
            SparseVideoGen(0.9).coarse_reach(LAYOUT)
        with pytest.raises(TypeError, match="no mask before it sees queries"):
            SparseVideoGen(0.6).token_mask(LAYOUT)
