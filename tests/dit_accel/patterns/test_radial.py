import itertools

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.patterns import Radial
from dit_accel.patterns.radial import radial_cells


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
            kept = nonzero > 0 and high / nonzero > 0.6
            mask[top : top + side, left : left + side] = kept or top == left
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


def cells_by_frame_pair(pattern: Radial, layout: TokenLayout) -> torch.Tensor:
    """The block rule as the authors have it: cells that any one of their frame pairs would keep by itself."""
    frames, tpf, side = layout.grid[0], layout.grid[1] * layout.grid[2], pattern.block_size
    cells = -(-layout.visual_len // side)
    place, widths = torch.arange(tpf), pattern.half_widths(layout).tolist()
    kept = torch.zeros(cells, cells, dtype=torch.bool)
    for i, j in itertools.product(range(frames), repeat=2):
        width = tpf if pattern.first_frame_sink and j == 0 else widths[abs(i - j)]
        left = j * tpf // side
        for r in range(i * tpf // side, ((i + 1) * tpf - 1) // side + 1):
            first, last = max(r * side - i * tpf, 0), min((r + 1) * side - i * tpf, tpf) - 1
            rows = (place + width).clamp(max=last) - (place - width).clamp(min=first) + 1
            columns = torch.zeros((((j + 1) * tpf - 1) // side + 1 - left) * side)
            columns[j * tpf - left * side :][:tpf] = rows.clamp(min=0) if width >= 0 else 0
            share = columns.view(-1, side) / (min((r + 1) * side, layout.visual_len) - r * side)
            high, nonzero = (share > 1 / 3).sum(1), (share > 0).sum(1)
            kept[r, left : left + len(share)] |= 10 * high > 6 * nonzero
    return kept


@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
class TestAuthorsCells:
    def test_are_ours_where_frames_are_whole_cells(self, sink):
        layout, pattern = TokenLayout((7, 8, 8)), Radial(0.3, 16, first_frame_sink=sink)
        assert torch.equal(radial_cells(pattern, layout), cells_by_frame_pair(pattern, layout))

    def test_differ_across_frame_borders_alone(self, sink):
        layout, pattern = TokenLayout((5, 14, 11)), Radial(0.5, 32, first_frame_sink=sink)
        differs = (radial_cells(pattern, layout) != cells_by_frame_pair(pattern, layout)).nonzero().tolist()
        assert differs
        across = {cell for cell in range(25) if 32 * cell // 154 < min(32 * cell + 31, 769) // 154}
        assert all(across & {r, c} for r, c in differs)

    @pytest.mark.slow
    @pytest.mark.parametrize("grid", [(21, 30, 52), (21, 45, 80), (33, 45, 80)], ids=str)
    def test_differ_as_little_as_documented(self, sink, grid):
        layout = TokenLayout(grid)
        pattern = Radial(0.2 if sink else 0.95, first_frame_sink=sink)
        differs = radial_cells(pattern, layout) != cells_by_frame_pair(pattern, layout)
        assert 0.0003 < differs.double().mean() < 0.0021


@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("grid", [(21, 4, 4), (33, 6, 10), (31, 5, 9), (21, 8, 8), (9, 1, 1)], ids=str)
def test_short_frames_leave_no_query_without_its_own_cell(grid, sink):
    """The paper's rule drops all cells of (21, 4, 4)."""
    layout, pattern = TokenLayout(grid, 5), Radial(0.95, first_frame_sink=sink)
    cell = torch.arange(layout.visual_len) // 128
    mask = pattern.token_mask(layout)[layout.visual_slice, layout.visual_slice]
    assert mask[cell[:, None] == cell].all()
    assert torch.equal(pattern.block_mask(layout).to_token_mask(), pattern.token_mask(layout))


def test_cells_of_more_rows_than_16_bits_count():
    """Of a cell's 40,000 rows all attend to frame 0: more than an int16 holds."""
    layout = TokenLayout((1000, 5, 10))
    pattern = Radial(0.2, 40_000, first_frame_sink=True)
    assert radial_cells(pattern, layout).tolist() == [[True, False], [True, True]]


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
