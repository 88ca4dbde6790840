import pytest

from dit_accel import TokenLayout
from dit_accel.patterns import InwardWindow


@pytest.mark.parametrize(
    ("grid", "half_window", "keys", "density"),
    [((21, 68, 120), (15, 26), 34_503, 0.201348), ((21, 135, 240), (22, 40), 76_545, 0.1125)],
    ids=["1080p", "4k"],
)
def test_published_figures(grid, half_window, keys, density):
    layout, pattern = TokenLayout(grid), InwardWindow(half_window)
    frames, rows, columns = (table.sum(1) for table in pattern.axis_tables(layout))
    per_query = {int(f * r * c) for f in frames.unique() for r in rows.unique() for c in columns.unique()}
    assert per_query == {keys}
    assert pattern.density(layout) == pytest.approx(density, abs=1e-6)


def test_the_window_slides_inward_and_covers_a_short_axis():
    _, rows, columns = InwardWindow((1, 4)).axis_tables(TokenLayout((2, 5, 6)))
    assert rows.int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1],
    ]
    assert columns.all()


@pytest.mark.slow
def test_the_best_order_spares_blocks_at_1080p():
    """FreeSwim's 48% of blocks at 1080p in raster order."""
    layout, pattern = TokenLayout((21, 68, 120)), InwardWindow((15, 26))
    raster, best = (
        pattern.block_mask(layout, (128, 128), order).block_density for order in ("raster", "auto")
    )
    assert raster == pytest.approx(0.48, abs=0.02)
    assert best <= 0.31


@pytest.mark.parametrize("value", [(1,), (-1, 2), (1.5, 2)])
def test_bad_arguments(value):
    with pytest.raises(ValueError, match="`half_window` must be 2 integers"):
        InwardWindow(value)
