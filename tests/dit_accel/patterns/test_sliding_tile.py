import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import SlidingTile


@pytest.mark.parametrize(
    ("grid", "density"), [((18, 48, 80), 0.25), ((30, 48, 80), 0.15)], ids=["short", "long"]
)
def test_published_densities(grid, density):
    layout = TokenLayout(grid)
    mask = SlidingTile((3, 3, 5)).block_mask(layout)
    assert SlidingTile((3, 3, 5)).density(layout) == density
    assert (mask.num_partial, mask.block_density) == (0, density)


@pytest.mark.parametrize("window", [(1, 2, 3), (3, 3, 5), (2, 4, 1)])
def test_definition(window):
    grid, tile = (5, 9, 13), (2, 2, 3)
    mask = SlidingTile(window, tile).token_mask(TokenLayout(grid)).view(*grid, *grid)
    counts = [-(-n // t) for n, t in zip(grid, tile, strict=True)]

    def sees(axis, q, k):
        half, count = window[axis] // 2, counts[axis]
        centre = min(max(q // tile[axis], half), count - 1 - half) if 2 * half + 1 < count else None
        return centre is None or abs(centre - k // tile[axis]) <= half

    for q in ((0, 0, 0), (4, 8, 12), (2, 5, 6), (1, 8, 0)):
        for axis in range(3):
            keys = mask[q].any(dim=tuple({0, 1, 2} - {axis}))
            assert keys.tolist() == [sees(axis, q[axis], k) for k in range(grid[axis])]
        axes = [mask[q].any(dim=tuple({0, 1, 2} - {axis})) for axis in range(3)]
        assert torch.equal(mask[q], axes[0][:, None, None] & axes[1][:, None] & axes[2])


@pytest.mark.parametrize(
    "arguments", [{"window": (3, 3)}, {"window": (3, 3, 0)}, {"window": (3, 3, 3), "tile": (0, 8, 8)}]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=r"must be 3 integers \(t, h, w\) of at least 1"):
        SlidingTile(**arguments)
