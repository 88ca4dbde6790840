import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import ChunkCausal, Clear, Dense, Neighborhood, Radial, Routed, ShiftedWindow

LAYOUT = TokenLayout((7, 4, 6), text_len=5)
BASES = {
    "everything": None,
    "dense": Dense(),
    "neighborhood": Neighborhood((3, 3, 3)),
    "discs": Clear(2),
    "radial": Radial(0.2, block_size=16),
    "radial-exact": Radial(0.2, block_size=4, exact=True),
}


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_definition(base, frames):
    """Frame f sees frame g iff g // n <= f // n, and where the base does."""
    pattern = ChunkCausal(frames, base)
    frame = torch.arange(7).repeat_interleave(24)
    causal = frame[None] // frames <= frame[:, None] // frames
    if base is not None:
        causal &= base.token_mask(TokenLayout(LAYOUT.grid))
    mask = pattern.token_mask(LAYOUT)
    assert torch.equal(mask[:168, :168], causal)
    assert mask[168:].all()
    assert mask[:, 168:].all()
    assert pattern.density(LAYOUT) == pytest.approx(mask.double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("order", ["auto", "raster", "tile", "hilbert"])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_block_mask(base, order):
    pattern = ChunkCausal(3, base)
    mask = pattern.block_mask(LAYOUT, (32, 16), order)
    assert torch.equal(mask.to_token_mask().squeeze(), pattern.token_mask(LAYOUT))


def test_queries_of_the_last_chunk_under_a_cache():
    """Keys of the whole video, queries of a chunk."""
    keys, queries = TokenLayout((6, 4, 6)), TokenLayout((3, 4, 6), offset=(3, 0, 0))
    pattern = ChunkCausal(3, Neighborhood((3, 3, 3)))
    whole = pattern.token_mask(keys)
    mask = pattern.block_mask(queries, (32, 16), "raster", keys=keys)
    assert torch.equal(mask.to_token_mask().squeeze(), whole[72:])


def test_window():
    """Up to the end of a frame's own chunk, the last of which is shorter."""
    pattern = ChunkCausal(3, Neighborhood((3, 3, 3)), window=4)
    frame = torch.arange(7).repeat_interleave(24)
    end = ((frame // 3 + 1) * 3).clamp(max=7)[:, None]
    seen = (frame < end) & (frame >= end - 4)
    alone = TokenLayout(LAYOUT.grid)
    assert torch.equal(ChunkCausal(3, window=4).token_mask(alone), seen)
    assert torch.equal(pattern.token_mask(alone), seen & Neighborhood((3, 3, 3)).token_mask(alone))
    for one in (pattern, ChunkCausal(3, window=4)):
        assert one.density(LAYOUT) == pytest.approx(one.token_mask(LAYOUT).double().mean().item(), abs=1e-12)
    with pytest.raises(ValueError, match="`window` must be"):
        ChunkCausal(3, window=2)


def test_steps_go_to_the_base():
    moving = ChunkCausal(2, ShiftedWindow())
    assert moving.at_step(3) == ChunkCausal(2, ShiftedWindow().at_step(3))
    assert moving.variants == [ChunkCausal(2, one) for one in ShiftedWindow().variants]


def test_bad_values():
    with pytest.raises(ValueError, match="`frames` must be a positive integer, got 0"):
        ChunkCausal(0)
    with pytest.raises(TypeError, match=r"`base` must be a static pattern.*got Routed"):
        ChunkCausal(3, Routed(top_k=0.5))
