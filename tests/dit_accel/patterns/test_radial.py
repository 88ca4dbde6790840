import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import Radial


@pytest.mark.parametrize(
    ("grid", "text", "pattern", "density", "blocks"),
    [
        ((18, 48, 80), 0, Radial(0.2, first_frame_sink=True), 0.28713, 83_728),
        ((18, 48, 80), 0, Radial(1.0, first_frame_sink=True), 0.43092, None),
        ((20, 48, 80), 0, Radial(0.8, first_frame_sink=True), 0.35253, None),
        ((30, 48, 80), 256, Radial(0.95), 0.27785, 226_056),
    ],
    ids=["wan2.1", "wan-decay-1", "wan2.2", "hunyuan-video"],
)
def test_published_block_densities(grid, text, pattern, density, blocks):
    mask = pattern.block_mask(TokenLayout(grid, text), (128, 128), "raster")
    assert mask.block_density == pytest.approx(density, abs=5e-6)
    assert blocks is None or mask.num_full + mask.num_partial == blocks
    assert pattern.density(TokenLayout(grid, text)) == pytest.approx(mask.density, rel=1e-12)


def naive_rule(pattern: Radial, layout: TokenLayout) -> torch.Tensor:
    """The token rule, one frame pair at a time."""
    frames, tpf = layout.grid[0], layout.grid[1] * layout.grid[2]
    place = torch.arange(tpf)
    mask = torch.zeros(frames, tpf, frames, tpf, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            d = abs(i - j)
            base = 2 ** tpf.bit_length() / 2 ** d.bit_length()
            width = tpf if d <= 1 else max(pattern.decay_factor * base, pattern.block_size)
            if not (base < 128 and d % int(128 / base)):
                mask[i, :, j] = (place[:, None] - place).abs() <= width
            if pattern.first_frame_sink and j == 0:
                mask[i, :, j] = True
    return mask.view(frames * tpf, frames * tpf)


def naive_cells(pattern: Radial, layout: TokenLayout) -> torch.Tensor:
    """The block rule, one cell at a time."""
    tokens, side, total = naive_rule(pattern, layout), pattern.block_size, layout.visual_len
    mask = torch.zeros_like(tokens)
    for top in range(0, total, side):
        for left in range(0, total, side):
            cell = tokens[top : top + side, left : left + side]
            share = cell.double().mean(0)
            high, nonzero = int((share > 1 / 3).sum()), int((share > 0).sum())
            mask[top : top + side, left : left + side] = nonzero > 0 and high / nonzero > 0.6
    return mask


@pytest.mark.parametrize("grid", [(7, 9, 11), (5, 4, 8), (12, 3, 5), (3, 16, 16), (1, 9, 9)], ids=str)
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("side", [16, 32, 128])
def test_definition(grid, sink, side):
    layout = TokenLayout(grid)
    pattern = Radial(0.3, side, first_frame_sink=sink)
    assert torch.equal(pattern.token_mask(layout), naive_cells(pattern, layout))
    exact = Radial(0.3, side, first_frame_sink=sink, exact=True)
    assert torch.equal(exact.token_mask(layout), naive_rule(exact, layout))


@pytest.mark.parametrize("grid", [(21, 45, 80), (21, 30, 52)], ids=["wan-720p", "wan-480p"])
def test_geometries_the_published_code_refuses(grid):
    layout = TokenLayout(grid)
    pattern = Radial(0.2, first_frame_sink=True)
    mask = pattern.block_mask(layout)
    assert mask.density == pytest.approx(pattern.density(layout), rel=1e-12)
    # whole cells: beyond the last, cut one, blocks cost nothing beyond the pattern
    assert mask.block_density == pytest.approx(mask.density, rel=5e-3)


@pytest.mark.parametrize(
    "arguments", [{"decay_factor": 0}, {"decay_factor": -1}, {"block_size": 0}, {"block_size": 1.5}]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="must be a positive"):
        Radial(**arguments)
