"""Blocks along an order of the axes, against loops over pairs of tokens."""

import itertools

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.masks.orders import AXIS_ORDERS, axes
from dit_accel.patterns.reordered_blocks import ReorderedBlocks, block_labels

GRID = (3, 4, 5)
LAYOUTS = [TokenLayout(GRID), TokenLayout(GRID, 7), TokenLayout(GRID, 7, text_first=True)]


def drawn(order: str, grid=GRID, size=16, seed=0) -> ReorderedBlocks:
    count = -(-grid[0] * grid[1] * grid[2] // size)
    kept = torch.rand(count, count, generator=torch.Generator().manual_seed(seed)) < 0.3
    return ReorderedBlocks.of(grid, order, size, kept | torch.eye(count, dtype=torch.bool))


def place(token: tuple[int, int, int], order: str) -> int:
    """Where a token stands, by its coordinates along the axes that the name lists, slowest first."""
    sizes = dict(zip("FHW", GRID, strict=True))
    at, coordinates = 0, dict(zip("FHW", token, strict=True))
    for axis in order:
        at = at * sizes[axis] + coordinates[axis]
    return at


@pytest.mark.parametrize("order", AXIS_ORDERS)
def test_names_of_orders(order):
    tokens = list(itertools.product(*map(range, GRID)))
    labels = block_labels(GRID, order, 16)
    assert labels.tolist() == [place(token, order) // 16 for token in tokens]
    assert axes(GRID, AXIS_ORDERS[order]).tolist() == sorted(
        range(len(tokens)), key=lambda i: place(tokens[i], order)
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=["no-text", "text-last", "text-first"])
@pytest.mark.parametrize("order", AXIS_ORDERS)
def test_pairs_are_those_of_kept_blocks(order, layout):
    """The last block, of fewer tokens, is judged like any other; text is dense by token."""
    pattern, tokens = drawn(order), list(itertools.product(*map(range, GRID)))
    expected = torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool)
    first = layout.visual_slice.start
    for (i, q), (j, k) in itertools.product(enumerate(tokens), repeat=2):
        kept = pattern.table[place(q, order) // 16, place(k, order) // 16]
        expected[first + i, first + j] = kept
    assert torch.equal(pattern.token_mask(layout), expected)
    assert pattern.density(layout) == pytest.approx(float(expected.double().mean()), abs=1e-12)
    for where in ("auto", "raster"):
        mask = pattern.block_mask(layout, (16, 16), where)
        assert torch.equal(mask.to_token_mask(), expected)


@pytest.mark.parametrize("order", AXIS_ORDERS)
def test_in_its_own_order_blocks_are_whole(order):
    """All but those that the end of the grid cuts."""
    pattern, layout = drawn(order, (4, 4, 8)), TokenLayout((4, 4, 8))
    mask = pattern.block_mask(layout, (16, 16), pattern.natural_orders(layout)[0])
    assert mask.num_partial == 0
    assert mask.block_density == float(pattern.table.double().mean())


@pytest.mark.parametrize("other", [(3, 4, 5), (6, 8, 10), (2, 3, 4), (5, 4, 7)])
def test_on_another_grid_tokens_attend_where_their_counterparts_do(other):
    pattern = drawn("HWF")
    moved = pattern.on(other)
    here = pattern.token_mask(TokenLayout(GRID))

    def counterpart(token):
        own = [int((n + 0.5) * a / b) for n, a, b in zip(token, GRID, other, strict=True)]
        return (own[0] * GRID[1] + own[1]) * GRID[2] + own[2]

    own = torch.tensor([counterpart(token) for token in itertools.product(*map(range, other))])
    wanted = here[own[:, None], own].double()
    labels = block_labels(other, "HWF", 16)
    for i, j in itertools.product(range(int(labels.max()) + 1), repeat=2):
        share = wanted[labels == i][:, labels == j].mean()
        assert moved.table[i, j] == (share >= 0.5 or i == j)
    assert moved.token_mask(TokenLayout(other)).diagonal().all()
    if other == GRID:
        assert moved == pattern


def test_what_is_refused():
    good = drawn("FHW")
    with pytest.raises(ValueError, match=r"`order` must be one of FHW, .*, got 'FWF'"):
        ReorderedBlocks(GRID, "FWF", 16, good.blocks)
    with pytest.raises(ValueError, match="bits of 4 x 4 blocks in 2 bytes"):
        ReorderedBlocks(GRID, "FHW", 16, b"")
    with pytest.raises(ValueError, match="every block's attention to itself"):
        ReorderedBlocks(GRID, "FHW", 16, bytes(2))
    with pytest.raises(ValueError, match=r"chosen for grid \(3, 4, 5\), got \(3, 4, 6\)"):
        good.rule(TokenLayout((3, 4, 6)))
