"""What a calibration chose, as a picture: layers downwards, heads to the right, a colour for each kind."""

from __future__ import annotations

import colorsys

from PIL import Image, ImageDraw, ImageFont

from dit_accel.masks.orders import AXIS_ORDERS
from dit_accel.patterns.calibration import STATIC, Calibration

_CELL, _MARGIN, _GAP, _MOST = 18, 96, 24, 12_000  # pixels
_INK, _PAPER = (40, 44, 52), (255, 255, 255)


def colours() -> dict[str, tuple[int, int, int]]:
    """Of every kind of choice: orders of the axes in warm hues, patterns in cold ones, dense grey."""
    found = {"Dense": (150, 150, 150)}
    kinds = [(name, 0.0, 0.16) for name in AXIS_ORDERS]
    kinds += [(name, 0.28, 0.85) for name in STATIC if name != "Dense"]
    for first, last in ((0.0, 0.16), (0.28, 0.85)):
        names = [name for name, low, _ in kinds if low == first]
        for at, name in enumerate(names):
            hue = first + (last - first) * at / max(1, len(names) - 1)
            light = (0.46, 0.62)[at % 2]
            found[name] = tuple(round(255 * x) for x in colorsys.hls_to_rgb(hue, light, 0.7))
    return found


def draw_choices(calibration: Calibration) -> Image.Image:
    """One panel for each row, beside each other; a choice with a tail has a white corner.

    Raises:
        ValueError: more layers, heads or rows than fit into a picture.
    """
    layers, heads, rows = len(calibration.layers), calibration.heads, calibration.rows
    width, height = _MARGIN + rows * (heads * _CELL + _GAP) + 150, 48 + max(layers, 18) * _CELL
    if max(width, height) > _MOST:
        raise ValueError(f"{layers} layers of {heads} heads in {rows} rows are too many for a picture")
    picture = Image.new("RGB", (width, height), _PAPER)
    pen, font, of_kind = ImageDraw.Draw(picture), ImageFont.load_default(), colours()
    for layer, name in enumerate(calibration.layers):
        pen.text((6, 42 + layer * _CELL), name[:14], _INK, font)
    shares, start = calibration.row_shares, 0.0
    for row in range(rows):
        left, stop = _MARGIN + row * (heads * _CELL + _GAP), start + shares[row]
        pen.text((left, 6), f"{start:.0%} to {stop:.0%}", _INK, font)
        pen.text((left, 20), "of the steps", _INK, font)
        start = stop
        for layer in range(layers):
            for head in range(heads):
                choice = calibration.choices(layer, head)[row]
                x, y = left + head * _CELL, 40 + layer * _CELL
                kind = choice.kind.removesuffix(" with a tail")
                pen.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), of_kind[kind])
                if choice.tail:
                    pen.polygon([(x + _CELL - 9, y), (x + _CELL - 2, y), (x + _CELL - 2, y + 7)], _PAPER)
    counts = calibration.counts()
    used = dict.fromkeys(kind.removesuffix(" with a tail") for kind in counts)
    for at, kind in enumerate(used):
        x, y = width - 142, 40 + at * _CELL
        pen.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), of_kind[kind])
        total = sum(n for name, n in counts.items() if name.removesuffix(" with a tail") == kind)
        pen.text((x + _CELL + 6, y + 2), f"{kind}: {total}", _INK, font)
    return picture
