"""Reads the captioned attributes of a scene back from pixels alone, by rule.

The object is what is coloured: a pixel's chroma is its largest minus its smallest channel, and its coverage
is its chroma relative to the object's. From that follow colour, outline, place and, in videos, motion.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from ..checker import Prediction
from .scenes import CELLS, COLOURS, CONTRAST, MOTIONS, POSITIONS, SHAPES, TRAVEL, Scene, render

CHROMA = 0.25  # of the palest pixel that may belong to the object; the palette begins at 0.56
SMALLEST = 0.004  # share of the canvas below which there is no object
DETAIL = 64  # pixels along the shorter side after averaging, which also averages noise away
GRID = 24  # resolution at which outlines are compared
FRAMES = 9  # of a video that are looked at


def check(pixels: np.ndarray) -> Prediction:
    """The attributes seen in an image (H, W, 3) or a video (T, H, W, 3), uint8 or floats in [0, 1].

    Attributes of the object are None where there is none; ``motion`` is there for videos only, and None for
    an object that stands still. Place is judged in the middle frame.
    """
    if pixels.ndim not in (3, 4) or pixels.shape[-1] != 3:
        raise ValueError(f"`pixels` must be (H, W, 3) or (T, H, W, 3), got shape {tuple(pixels.shape)}")
    video = pixels.ndim == 4 and len(pixels) > 1
    frames = pixels if pixels.ndim == 4 else pixels[None]
    chosen = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)
    frames = [_reduce(frames[index]) for index in chosen]
    covers = [_coverage(frame) for frame in frames]
    middle = len(frames) // 2

    found: Prediction = {
        "colour": None,
        "shape": None,
        "position": None,
        "background": _background(frames[middle], covers[middle]),
    }
    if video:
        found["motion"] = None
    boxes = [_box(cover) for cover in covers]
    seen = [index for index, box in enumerate(boxes) if box is not None]
    if boxes[middle] is None:
        return found
    found["colour"] = _colour(frames[middle], covers[middle])
    found["shape"] = _shape([_outline(covers[index], boxes[index]) for index in seen])
    x, y = _centre(covers[middle], boxes[middle])
    found["position"] = POSITIONS[3 * _cell(y) + _cell(x)]
    if video:
        found["motion"] = _motion(seen, [_centre(covers[index], boxes[index]) for index in seen], len(frames))
    return found


def _reduce(frame: np.ndarray) -> np.ndarray:
    """The frame in floats, averaged over squares until its shorter side has about ``DETAIL`` pixels."""
    frame = frame.astype(np.float32) / (255 if frame.dtype == np.uint8 else 1)
    height, width, _ = frame.shape
    factor = max(1, min(height, width) // DETAIL)
    height, width = height // factor, width // factor
    frame = frame[: height * factor, : width * factor]
    return frame.reshape(height, factor, width, factor, 3).mean((1, 3))


def _coverage(frame: np.ndarray) -> np.ndarray:
    """How much of each pixel (H, W) the object covers; all 0 where nothing is coloured."""
    chroma = frame.max(-1) - frame.min(-1)
    core = chroma[chroma > CHROMA]
    if core.size < SMALLEST * chroma.size:
        return np.zeros_like(chroma)
    return np.clip((chroma / np.median(core) - 0.3) / 0.4, 0, 1)


def _span(profile: np.ndarray) -> tuple[float, float]:
    """Where a profile is above a tenth of its peak: (start, end) in pixels."""
    inside = np.flatnonzero(profile > 0.1 * profile.max())
    return float(inside[0]), float(inside[-1] + 1)


def _box(cover: np.ndarray) -> tuple[float, float, float, float] | None:
    """The object's bounding box (left, top, right, bottom) in pixels, None without an object."""
    if cover.sum() < SMALLEST * cover.size:
        return None
    left, right = _span(cover.sum(0))
    top, bottom = _span(cover.sum(1))
    return left, top, right, bottom


def _centre(cover: np.ndarray, box: tuple[float, float, float, float]) -> tuple[float, float]:
    """The box's centre (x, y) in fractions of the canvas."""
    left, top, right, bottom = box
    return (left + right) / 2 / cover.shape[1], (top + bottom) / 2 / cover.shape[0]


def _cell(place: float) -> int:
    """The row or column nearest to ``place``."""
    return int(np.argmin([abs(place - cell) for cell in CELLS]))


def _outline(cover: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """The object stretched to a square: coverage (GRID, GRID) by bilinear sampling of its box."""
    left, top, right, bottom = box
    places = (np.arange(GRID) + 0.5) / GRID
    x = np.clip(left + places * (right - left) - 0.5, 0, cover.shape[1] - 1.001)
    y = np.clip(top + places * (bottom - top) - 0.5, 0, cover.shape[0] - 1.001)
    column, row = x.astype(int), y.astype(int)
    across, down = (x - column)[None, :], (y - row)[:, None]
    upper, lower = cover[row], cover[row + 1]
    upper = upper[:, column] * (1 - across) + upper[:, column + 1] * across
    lower = lower[:, column] * (1 - across) + lower[:, column + 1] * across
    return upper * (1 - down) + lower * down


@cache
def _templates() -> dict[str, np.ndarray]:
    """The outline of every shape, through the same code as the outlines that they are compared with."""
    templates = {}
    for shape in SHAPES:
        cover = _coverage(render(Scene("red", shape, "center", "plain", radius=0.3), 96, 96)[0])
        templates[shape] = _outline(cover, _box(cover))
    return templates


def _shape(outlines: Iterable[np.ndarray]) -> str:
    """The shape whose template is nearest to the outlines of all frames."""
    outlines = list(outlines)
    templates = _templates()
    return min(
        templates, key=lambda shape: sum(np.square(outline - templates[shape]).sum() for outline in outlines)
    )


def _colour(frame: np.ndarray, cover: np.ndarray) -> str:
    """The palette colour of the nearest hue: both are compared without their grey part."""

    def hue(colour: np.ndarray) -> np.ndarray:
        pure = colour - colour.mean()
        return pure / np.linalg.norm(pure)

    core = cover > 0.9
    seen = hue(frame[core if core.any() else cover > 0.5].mean(0))
    return max(COLOURS, key=lambda name: float(hue(np.asarray(COLOURS[name])) @ seen))


def _background(frame: np.ndarray, cover: np.ndarray) -> str:
    """Plain where greys hardly vary, striped where whole columns (or rows) do, else checkered."""
    grey = np.where(cover > 0.02, np.nan, frame.mean(-1))
    if np.isfinite(grey).mean() < 0.2:
        return "plain"
    variance = float(np.nanvar(grey))
    if variance < (CONTRAST / 2) ** 2:
        return "plain"
    profiles = [_profile(grey, axis) for axis in (0, 1)]
    return "striped" if max(profile.var() for profile in profiles) > 0.5 * variance else "checkered"


def _profile(grey: np.ndarray, axis: int) -> np.ndarray:
    """Means along ``axis`` of the lines of which at least a quarter is background."""
    known = np.isfinite(grey)
    enough = known.mean(axis) >= 0.25
    return np.nansum(grey, axis)[enough] / known.sum(axis)[enough]


def _motion(times: Sequence[int], centres: Sequence[tuple[float, float]], frames: int) -> str | None:
    """Where the centres drift over the whole clip, None for less than a third of the usual way."""
    if len(times) < 3:
        return None
    slope_x, slope_y = np.polyfit(times, np.asarray(centres), 1)[0] * (frames - 1)
    across = abs(slope_x) >= abs(slope_y)
    slope = slope_x if across else slope_y
    if abs(slope) < 2 * TRAVEL / 3:
        return None
    step = (int(np.sign(slope)), 0) if across else (0, int(np.sign(slope)))
    return next(name for name, direction in MOTIONS.items() if direction == step)
