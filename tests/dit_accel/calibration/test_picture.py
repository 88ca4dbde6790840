"""Each head's cell has the colour of what it was given, with a white corner for a tail."""

import calibrations
import pytest

from dit_accel.calibration.picture import _CELL, _GAP, _MARGIN, colours, draw_choices
from dit_accel.masks.orders import AXIS_ORDERS
from dit_accel.patterns import Clear, Dense, Neighborhood
from dit_accel.patterns.calibration import STATIC


def test_every_kind_has_a_colour_of_its_own():
    known = colours()
    assert set(known) == {*AXIS_ORDERS, *STATIC}
    assert len(set(known.values())) == len(known)


def test_cells():
    found = calibrations.drawn((3, 4, 6), patterns=(Dense(), Neighborhood(3), Clear(2)))
    picture, known = draw_choices(found), colours()
    for row in range(found.rows):
        for layer in range(2):
            for head in range(found.heads):
                choice = found.choices(layer, head)[row]
                x = _MARGIN + row * (found.heads * _CELL + _GAP) + head * _CELL
                y = 40 + layer * _CELL
                assert picture.getpixel((x + 3, y + _CELL - 4)) == known[choice.kind.split(" ")[0]]
                corner = picture.getpixel((x + _CELL - 3, y + 1))
                assert (corner == (255, 255, 255)) == choice.tail


def test_too_large_is_refused():
    with pytest.raises(ValueError, match="are too many for a picture"):
        draw_choices(calibrations.drawn((1, 4, 4), heads=400, rows=2))
