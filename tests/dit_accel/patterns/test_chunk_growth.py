"""ChunkGrowth: the published densities, the choice against loops in float64, and SkyReels-V2."""

import copy
import pickle

import pytest
import torch

from dit_accel import Recipe, TokenLayout, attention, summary
from dit_accel.errors import UnavailableError
from dit_accel.patterns import ChunkCausal, ChunkGrowth
from dit_accel.runtime.switching import accelerated, enable

PATTERN = ChunkGrowth(2, 0.3, 0.1, top_frames=1, block_size=(16, 16))
LAYOUTS = {
    "video": TokenLayout((8, 4, 8)),
    "ragged": TokenLayout((7, 5, 7), 9),
    "text-first": TokenLayout((6, 4, 6), 5, True),
    "anchor": TokenLayout((8, 4, 6), 4, anchor=(1, 2, 3)),
    "one-frame": TokenLayout((1, 5, 7), 3),
}


def inputs(layout):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, layout.seq_len, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_the_published_example():
    """21 frames in chunks of 3, density 0.15, base 0.05: b = 0.374795, and the sparsities it gives."""
    found = ChunkGrowth().chunk_densities(7)
    assert (found[1] - 0.05) * 6**0.5 == pytest.approx(0.374795, abs=5e-7)
    assert [round(1 - d, 3) for d in found] == [0, 0.797, 0.825, 0.842, 0.853, 0.862, 0.868]
    seen = range(6, 22, 3)
    assert sum(d * n for d, n in zip(found[1:], seen, strict=True)) == pytest.approx(0.15 * sum(seen))


def test_windows_and_shares_that_are_cut_off():
    found, seen = ChunkGrowth(3, window=9).chunk_densities(7), [6, 9, 9, 9, 9, 9]
    assert sum(d * n for d, n in zip(found[1:], seen, strict=True)) == pytest.approx(0.15 * sum(seen))
    assert ChunkGrowth(3, 0.9).chunk_densities(7)[1] == 1
    assert ChunkGrowth().chunk_densities(1) == [1]


def expected(pattern, q, k, layout):
    """One head's mask over the tokens (S, S), by loops over blocks of visual tokens in raster order."""
    (bq, bk), size = pattern.block_size, pattern.frames_per_chunk
    frames, tokens = layout.grid[0], layout.grid[1] * layout.grid[2]
    place = layout.text_last.tolist()  # visual tokens, anchor, text
    q, k = q[place], k[place]
    causal = ChunkCausal(size, window=pattern.window).token_mask(layout)[place][:, place]
    visual, total = layout.visual_len, layout.seq_len
    rows, columns = ((total if total == visual else visual // n * n) for n in (bq, bk))
    ends = [min(at + size, frames) for at in range(0, frames, size)]
    shares = pattern._densities([min(size, frames - at) for at in range(0, frames, size)])
    frame_means = [k[f * tokens : (f + 1) * tokens].mean(0) for f in range(frames)]
    mask = torch.ones_like(causal)
    for i in range(0, rows, bq):
        block = slice(i, min(i + bq, visual))
        first, last = i // tokens // size, (block.stop - 1) // tokens // size
        begin = last * size
        mean = q[begin * tokens : ends[last] * tokens].mean(0)
        oldest = max(0, ends[last] - pattern.window) if pattern.window else 0
        before = sorted(range(oldest, begin), key=lambda f: -float(mean @ frame_means[f]))
        kept = {*before[: pattern.top_frames], 0, *range(begin - size, begin)} & set(before)
        past = [
            j for j in range(0, columns, bk)
            if (min(j + bk, visual) - 1) // tokens < first * size and causal[block, j : j + bk].any()
        ]  # fmt: skip
        able = [j for j in past if kept & {t // tokens for t in range(j, min(j + bk, visual))}]
        able.sort(key=lambda j: -float(q[block].mean(0) @ k[j : min(j + bk, visual)].mean(0)))
        taken = able[: round(shares[last] * len(past))]
        for j in set(past) - set(taken):
            mask[block, j : min(j + bk, visual)] = False
    found = torch.empty_like(causal)
    found[torch.tensor(place)[:, None], torch.tensor(place)] = mask & causal
    return found


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_definition(layout, window):
    q, k, v = inputs(layout)
    pattern = ChunkGrowth(2, 0.3, 0.1, window, 1, (16, 16))
    mask = pattern.select(q, k, layout)
    mask.validate()
    allowed = mask.to_token_mask()
    exact = torch.stack(
        [torch.stack([expected(pattern, q[b, h], k[b, h], layout) for h in (0, 1)]) for b in (0, 1)]
    )
    assert torch.equal(allowed, exact)
    assert allowed.double().mean() <= pattern.density(layout) + 1e-9
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, exact)
    for backend in ("auto", "reference"):
        torch.testing.assert_close(attention(q, k, v, pattern, layout, backend=backend), plain)


def test_aim_is_what_is_computed_where_frames_suffice():
    layout, pattern = LAYOUTS["video"], ChunkGrowth(2, 0.3, 0.1, top_frames=8, block_size=(16, 16))
    q, k, _ = inputs(layout)
    computed = pattern.select(q, k, layout).to_token_mask().double().mean(dim=(2, 3))
    assert computed.flatten().tolist() == pytest.approx([pattern.density(layout)] * 4)


def test_density_is_a_number_and_answers_for_layouts():
    assert PATTERN.density == 0.3
    assert PATTERN == pickle.loads(pickle.dumps(PATTERN)) == copy.deepcopy(PATTERN)
    recipe = Recipe(PATTERN)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert "density: 0.3" in recipe.to_yaml()


def test_skyreels(skyreels):
    """Within the model's own chunks, whose frames it must name; told by `summary`, no tail."""
    pipe = skyreels.pipe
    pipe.transformer._set_ar_attention(2)
    grid = (6, 6, 8)
    enable(pipe, PATTERN)
    found = skyreels.run(pipe, grid=grid, steps=2)
    (row, *_) = summary(pipe).rows
    causal = ChunkCausal(2).density(TokenLayout(grid))
    assert row["density"] == pytest.approx(PATTERN.density(TokenLayout(grid)), abs=0.1)
    assert row["density"] < causal
    with accelerated(pipe, Recipe(PATTERN, backend="reference")):
        torch.testing.assert_close(found, skyreels.run(pipe, grid=grid, steps=2), rtol=1e-4, atol=1e-5)
    pipe.transformer._set_ar_attention(3)
    with accelerated(pipe, PATTERN), pytest.raises(ValueError, match="use frames_per_chunk=3"):
        skyreels.run(pipe, grid=grid)
    with pytest.raises((ValueError, UnavailableError), match="hides keys on purpose"):
        enable(pipe, Recipe(PATTERN, tail="pooled"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames_per_chunk": 0}, "`frames_per_chunk` must be a positive integer, got 0"),
        ({"density": 1.5}, "`density` must be a number above 0 and at most 1, got 1.5"),
        ({"base": 0.2}, "`base` must be a number from 0 to `density` 0.15, got 0.2"),
        ({"window": 2}, "`window` must be"),
        ({"block_size": (8, 8)}, "block_size"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChunkGrowth(**arguments)
