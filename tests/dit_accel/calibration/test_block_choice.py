"""Blocks and orders by mass, against sorting in Python; a head that is painted along an axis is found."""

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.attention.call import AttentionCall
from dit_accel.calibration.block_choice import best_orders, kept_blocks
from dit_accel.calibration.block_mass import block_mass
from dit_accel.masks.orders import AXIS_ORDERS
from dit_accel.patterns.reordered_blocks import block_labels

MASS = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def by_sorting(mass, number):
    """The diagonal, then the largest others of maps (n, b, b)."""
    places = [
        (i != j, -float(mass[m, i, j]), m, i, j)
        for m in range(len(mass))
        for i in range(mass.shape[1])
        for j in range(mass.shape[2])
    ]
    kept = torch.zeros_like(mass, dtype=torch.bool)
    for *_, m, i, j in sorted(places)[:number]:
        kept[m, i, j] = True
    return kept


@pytest.mark.parametrize("density", [0.01, 0.2, 0.36, 0.9, 1.0])
def test_kept_of_each_map(density):
    kept = kept_blocks(MASS, density)
    number = max(5, round(density * 25))
    assert (kept.sum((-2, -1)) == number).all()
    for a in range(2):
        for b in range(3):
            assert torch.equal(kept[a, b], by_sorting(MASS[a, b][None], number)[0])


@pytest.mark.parametrize("density", [0.3, 0.36, 0.9])
def test_kept_of_all_maps_by_one_threshold(density):
    kept = kept_blocks(MASS, density, "global")
    assert torch.equal(kept.flatten(0, 1), by_sorting(MASS.flatten(0, 1), round(density * 150)))
    assert kept.diagonal(dim1=-2, dim2=-1).all()
    assert len(set(kept.sum((-2, -1)).flatten().tolist())) > 1


@pytest.mark.parametrize("order", AXIS_ORDERS)
def test_a_head_that_looks_along_two_axes_gets_an_order_that_makes_these_blocks(order):
    """Tokens of one slice across the slowest axis see each other alone: 16, a block under `order`."""
    grid, slowest = (4, 4, 4), "FHW".index(order[0])
    layout = TokenLayout(grid)
    slices = torch.nn.functional.one_hot(layout.coordinates[:, slowest].long(), 4).float() * 12
    call = AttentionCall(*([slices.expand(1, 1, -1, -1)] * 3), layout, dense=lambda call: call.q)
    mass = block_mass(call, [block_labels(grid, name, 16) for name in AXIS_ORDERS])
    best = best_orders(mass[None], 0.25)[0].tolist()
    assert list(AXIS_ORDERS)[best[0]][0] == order[0]
    assert {list(AXIS_ORDERS)[n][0] for n in best[:2]} == {order[0]}


def test_of_equal_orders_the_first():
    assert best_orders(torch.ones(2, 3, 6, 4, 4), 0.5).tolist() == [list(range(6))] * 3
