"""Masks of calls with a cache of keys against loops over tokens, in every order."""

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.masks.chunk_layout import ChunkLayout
from dit_accel.patterns import Clear, Dense, LocalGlobal, Neighborhood, Radial, SlidingTile

GRID, CHUNKS = (9, 5, 6), (1, 3, 3, 2)
CALLS = {
    "first chunk": ChunkLayout(GRID, chunks=CHUNKS, present=1, last_alone=True, zeros=3, padding=3),
    "coarse past": ChunkLayout(GRID, chunks=CHUNKS, present=4, coarse=2, last_alone=True, zeros=7, padding=7),
    "other groups": ChunkLayout(GRID, chunks=CHUNKS, present=3, coarse=1, group=(5, 3), last_alone=True),
    "all tokens": ChunkLayout(GRID, chunks=CHUNKS, present=4, coarse=2, padding=9),
    "nothing coarse": ChunkLayout(GRID, chunks=CHUNKS, present=2),
}
PATTERNS = (
    Dense(),
    Neighborhood((3, 3, 3)),
    Clear(2),
    Radial(0.2, block_size=16),
    SlidingTile((1, 3, 1), (2, 2, 2)),
    LocalGlobal((3, 4)),
)


def tokens(layout):
    """Of each token the chunk, and the tokens of the grid that it stands for."""
    _, height, width = GRID
    found, frame = [], 0
    for chunk, frames in enumerate(CHUNKS[: layout.present]):
        rows, columns = layout.group if chunk < layout.coarse else (1, 1)
        for f in range(frame, frame + frames):
            for h in range(0, height // rows * rows, rows):
                for w in range(0, width // columns * columns, columns):
                    places = [(f, h + y, w + x) for y in range(rows) for x in range(columns)]
                    found.append((chunk, [(a * height + b) * width + c for a, b, c in places]))
        frame += frames
    return found


def expected(pattern, layout):
    whole, keys = pattern.token_mask(TokenLayout(GRID)), tokens(layout)
    queries = [key for key in keys if key[0] == layout.present - 1] if layout.last_alone else keys
    zeros = [True] * layout.zeros
    rows = [
        [mine >= other and bool(whole[own][:, theirs].any()) for other, theirs in keys] + zeros
        for mine, own in queries
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: type(pattern).__name__)
@pytest.mark.parametrize("layout", CALLS.values(), ids=CALLS)
def test_a_pattern_holds_between_any_tokens_that_two_stand_for(layout, pattern):
    exact = expected(pattern, layout)
    assert (layout.seq_len, layout.kv_len) == exact.shape
    assert torch.equal(pattern.token_mask(layout), exact)
    assert pattern.density(layout) == pytest.approx(float(exact.double().mean()))
    for order in ("raster", "tile", "hilbert", "auto"):
        mask = pattern.block_mask(layout, (16, 16), order)
        mask.validate()
        assert torch.equal(mask.to_token_mask(), exact)


def test_sizes():
    layout = CALLS["coarse past"]
    assert layout.frame_tokens == [6] * 4 + [30] * 5
    assert (layout.seq_len, layout.tokens, layout.kv_len) == (60, 174, 181)
    assert (layout.call_lengths, layout.pairs) == ((67, 181), 60 * 181)
    layout = CALLS["all tokens"]
    assert (layout.seq_len, layout.kv_len, layout.call_lengths) == (174, 174, (183, 183))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunks": (3, 3)}, "must be the 9 frames of the grid"),
        ({"present": 5}, "`present` must be from 1 to 4"),
        ({"present": 2, "coarse": 2, "last_alone": True}, "`coarse` from 0 to 1, got 2 and 2"),
        ({"present": 4, "coarse": 1, "group": (6, 6)}, "must fit into the rows and columns"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        ChunkLayout(GRID, **{"chunks": CHUNKS, "present": 1, **options})


def test_keys_are_its_own():
    with pytest.raises(ValueError, match="says itself what the keys are"):
        Dense().block_mask(CALLS["all tokens"], keys=TokenLayout(GRID))
