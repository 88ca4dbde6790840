import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.masks import orders

grids = st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12))


def coordinates(order, grid):
    return torch.stack([order // (grid[1] * grid[2]), order // grid[2] % grid[1], order % grid[2]], 1)


@given(grids, st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 8)))
def test_every_order_is_a_permutation(grid, tile):
    everything = torch.arange(grid[0] * grid[1] * grid[2])
    for order in (
        orders.raster(grid),
        orders.hilbert(grid),
        orders.tiles(grid, tile),
        orders.axes(grid, (2, 0, 1)),
    ):
        assert torch.equal(order.sort().values, everything)


@given(grids)
def test_hilbert_steps_to_a_neighbour(grid):
    steps = coordinates(orders.hilbert(grid), grid).diff(dim=0).abs()
    assert not steps.numel() or steps.max() <= 1  # 26-adjacent: an odd axis can force one diagonal step


def test_whole_tiles_are_aligned_whatever_the_grid():
    grid, tile = (5, 45, 83), (2, 8, 8)
    blocks = coordinates(orders.tiles(grid, tile), grid)[: 2 * 5 * 10 * 128].view(-1, 128, 3)
    assert torch.equal(blocks.amax(1) - blocks.amin(1), torch.tensor([[1, 7, 7]]).expand(len(blocks), 3))


def test_aligned_runs_inside_a_tile_are_boxes():
    blocks = coordinates(orders.tiles((1, 16, 32), (1, 8, 16)), (1, 16, 32))
    for run, sides in ((64, [0, 7, 7]), (32, [0, 3, 7]), (16, [0, 3, 3])):
        parts = blocks.view(-1, run, 3)
        extent = (parts.amax(1) - parts.amin(1)).sort(1).values
        assert torch.equal(extent, torch.tensor([sides]).sort(1).values.expand(len(parts), 3))


def test_axes_runs_over_the_last_named_axis_fastest():
    order = orders.axes((2, 3, 4), (1, 2, 0))  # over frames fastest
    assert coordinates(order, (2, 3, 4))[:3].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1]]


def test_bad_arguments():
    with pytest.raises(ValueError, match="`permutation` must be a permutation"):
        orders.axes((1, 2, 3), (0, 1, 1))
    with pytest.raises(ValueError, match="`tile` must be three positive"):
        orders.tiles((1, 2, 3), (0, 1, 1))
