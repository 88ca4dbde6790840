"""Candidates: names and patterns on a layout, at widths near the densities that are wanted."""

import pytest

from dit_accel import TokenLayout
from dit_accel.calibration.candidates import DENSITIES, WIDTHS, static_candidates, widths_of
from dit_accel.patterns import Clear, Dense, Neighborhood, Radial, Routed
from dit_accel.patterns.calibration import STATIC

VIDEO, IMAGE = TokenLayout((8, 16, 16), 7), TokenLayout((1, 32, 32), 7, text_first=True)


@pytest.mark.parametrize("layout", [VIDEO, IMAGE], ids=["video", "image"])
@pytest.mark.parametrize("kind", WIDTHS)
def test_widths_suit_the_grid(kind, layout):
    found = widths_of(kind, layout)
    assert len(found) <= len(DENSITIES)
    assert all(type(pattern).__name__ == kind and pattern.density(layout) < 1 for pattern in found)
    if kind in ("Radial", "TemporalHead") and layout is IMAGE:
        assert not found  # in one frame they are dense, or another


def test_names_and_patterns():
    every = static_candidates(("reordered", "static"), VIDEO)
    assert {type(pattern) for pattern in every} >= {Radial, Neighborhood, Clear}
    assert {*WIDTHS, "Dense"} == set(STATIC)
    assert static_candidates(("reordered",), VIDEO) == ()
    assert static_candidates(("Dense", Clear(3), Clear(3)), VIDEO) == (Dense(), Clear(3))
    for wrong in ("Routed", "radial", 3, Routed(top_k=0.2)):
        with pytest.raises(ValueError, match="a candidate must be 'reordered', 'static', one of"):
            static_candidates((wrong,), VIDEO)
    with pytest.raises(ValueError, match="`window`"):
        static_candidates((Neighborhood(99),), VIDEO)
