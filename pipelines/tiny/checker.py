"""Reads the captioned attributes of a scene back from pixels alone, by rule.

An object is the sprite whose drawing over the background explains most of a picture's difference from its
background: the largest drop in squared error over all sprites, places and three sizes. What is left explains
a second one, if there is one. From that follow objects, places and, in videos, motion; what no object covers
is the background.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from .scenes import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    CONTRAST,
    MOTIONS,
    POSITIONS,
    SLOPE,
    TRAVEL,
    object_side,
)
from .sprites import OBJECTS, place

DETAIL = 24  # pixels that an object's side is reduced to, which also averages noise away
SCALES = (0.92, 1.0, 1.08)
PRESENT = 0.35  # share of a sprite's difference from the background that its drawing must explain
FRAMES = 9  # of a video that are looked at

Prediction = dict[str, str | None]


@dataclass(frozen=True)
class _Match:
    name: str
    scale: float
    x: float  # of the centre, in pixels of the reduced picture
    y: float


def check(pixels: np.ndarray) -> Prediction:
    """The attributes seen in an image (H, W, 3) or a video (T, H, W, 3), uint8 or floats in [0, 1].

    ``object`` and ``position`` are None where there is no object; those of a second object are there where
    one is seen. ``motion`` is there for videos only, and None for an object that stands still. All but motion
    is judged in the middle frame.
    """
    if pixels.ndim not in (3, 4) or pixels.shape[-1] != 3:
        raise ValueError(f"`pixels` must be (H, W, 3) or (T, H, W, 3), got shape {tuple(pixels.shape)}")
    video = pixels.ndim == 4 and len(pixels) > 1
    frames = pixels if pixels.ndim == 4 else pixels[None]
    chosen = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)
    reduced = [_reduce(frames[index]) for index in chosen]
    middle = reduced[len(reduced) // 2]
    matches, colour, background = _read(middle, 1 if video else 2)
    found: Prediction = {"object": None, "position": None}
    for prefix, match in zip(("", "second "), matches, strict=False):
        found |= {f"{prefix}object": match.name, f"{prefix}position": _position(match, middle.shape)}
    found |= {"colour": colour, "background": background}
    if video:
        found["motion"] = _motion(reduced, matches[0].name) if matches else None
    return found


def count_objects(pixels: np.ndarray, most: int = 9) -> int:
    """How many objects `check` would see, up to ``most``: in an image, or the middle frame of a video."""
    frame = pixels if pixels.ndim == 3 else pixels[len(pixels) // 2]
    return len(_read(_reduce(frame), most)[0])


def score(predictions: Sequence[Prediction], asked: Sequence[Mapping[str, str]]) -> dict[str, float | int]:
    """Share of right predictions per attribute, their ``mean``, ``all_correct`` and sample count ``n``.

    ``asked`` holds the attributes of the scenes that should be seen. Those that only some of them have are
    averaged over these.
    """
    if len(predictions) != len(asked) or not asked:
        raise ValueError(f"`predictions` and `asked` must pair up, got {len(predictions)} and {len(asked)}")
    right = [
        {name: prediction.get(name) == value for name, value in attributes.items()}
        for prediction, attributes in zip(predictions, asked, strict=True)
    ]
    names = max(asked, key=len)
    accuracy = {name: float(np.mean([one[name] for one in right if name in one])) for name in names}
    every = [value for one in right for value in one.values()]
    whole = float(np.mean([all(one.values()) for one in right]))
    return accuracy | {"mean": float(np.mean(every)), "all_correct": whole, "n": len(asked)}


def _reduce(frame: np.ndarray) -> np.ndarray:
    """The frame in floats, reduced until objects are about ``DETAIL`` pixels wide."""
    frame = frame.astype(np.float32) / (255 if frame.dtype == np.uint8 else 1)
    height, width, _ = frame.shape
    factor = DETAIL / object_side(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    picture = torch.from_numpy(frame).permute(2, 0, 1)[None]
    return F.interpolate(picture, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


@cache
def _drawings() -> tuple[list[tuple[str, float]], torch.Tensor]:
    """Names and scales of what is matched, and the drawings (N, 4, S, S), colour times coverage first."""
    side = 2 * round(DETAIL * max(SCALES) / 2) + 1
    places = np.arange(side) + 0.5
    keys = [(name, scale) for name in OBJECTS for scale in SCALES]
    drawings = [place(name, (side / 2, side / 2), scale * DETAIL, places, places) for name, scale in keys]
    return keys, torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2).contiguous()


@lru_cache(maxsize=2)
def _spectra(height: int, width: int) -> torch.Tensor:
    """Of the drawings, of the size that `_padded` gives pictures of this size: complex64 (N, 4, ...)."""
    return torch.fft.rfft2(_drawings()[1], _padded(height, width)).conj()


def _padded(height: int, width: int) -> tuple[int, int]:
    """A size with room for half a drawing on all sides, whose transform is fast."""
    border = _drawings()[1].shape[-1] - 1
    return 8 * -(-(height + border) // 8), 8 * -(-(width + border) // 8)


def _backdrop(picture: np.ndarray) -> np.ndarray:
    """The plane (H, W, 3) through most of a picture's pixels: what stands out is left out, step by step."""
    height, width, _ = picture.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    terms = np.stack([np.ones_like(x), x, y], -1).reshape(-1, 3)
    colours = picture.reshape(-1, 3)
    fit = np.array([np.median(colours, 0), np.zeros(3), np.zeros(3)])
    for _ in range(6):
        error = np.square(colours - terms @ fit).sum(1)
        kept = error <= np.quantile(error, 0.6)
        fit = np.linalg.lstsq(terms[kept], colours[kept], rcond=None)[0]
    return (terms @ fit).reshape(picture.shape).astype(np.float32)


def _search(difference: np.ndarray, backdrop: np.ndarray, only: str | None = None) -> tuple[_Match, float]:
    """The best match, and the share of its own difference from the backdrop that it explains."""
    keys, drawings = _drawings()
    height, width, _ = difference.shape
    spectra = _spectra(height, width)
    if only is not None:
        chosen = [index for index, key in enumerate(keys) if key[0] == only]
        keys, drawings, spectra = [keys[index] for index in chosen], drawings[chosen], spectra[chosen]
    tone = torch.from_numpy(backdrop.mean((0, 1)))
    energy = (drawings[:, :3] - drawings[:, 3:] * tone[:, None, None]).square().sum((1, 2, 3))
    inputs = torch.from_numpy(difference).permute(2, 0, 1)
    toned = (inputs * tone[:, None, None]).sum(0, keepdim=True)
    inputs = torch.cat([inputs, -toned])
    border, size = drawings.shape[-1] // 2, _padded(height, width)
    seen = torch.fft.rfft2(F.pad(inputs, (border, 0, border, 0)), size)
    # the correlation with each drawing less its coverage of the tone; conv2d would take four times as long
    product = torch.fft.irfft2((seen * spectra).sum(1), size)[:, :height, :width]
    explained = 2 * product - energy[:, None, None]
    index, row, column = np.unravel_index(int(explained.argmax()), explained.shape)
    name, scale = keys[index]
    share = float(explained[index, row, column] / energy[index])
    return _Match(name, scale, column + 0.5, row + 0.5), share


def _draw(match: _Match, shape: tuple[int, ...]) -> np.ndarray:
    """A match's sprite on an empty picture: (H, W, 4)."""
    rows, columns = (np.arange(length) + 0.5 for length in shape[:2])
    return place(match.name, (match.x, match.y), match.scale * DETAIL, columns, rows)


def _read(picture: np.ndarray, most: int) -> tuple[list[_Match], str, str]:
    """Up to ``most`` objects in reading order, the background's colour and its pattern."""
    backdrop = _backdrop(picture)
    difference, covered, matches = picture - backdrop, np.zeros(picture.shape[:2], bool), []
    for _ in range(most):
        match, share = _search(difference, backdrop)
        if share < PRESENT:
            break
        drawn = _draw(match, picture.shape)
        covered |= drawn[..., 3] > 0.02
        difference = np.where(drawn[..., 3:] > 0.02, 0, difference)
        matches.append(match)
    matches.sort(key=lambda match: POSITIONS.index(_position(match, picture.shape)))
    return matches, *_background(picture, backdrop, ~covered)


def _position(match: _Match, shape: tuple[int, ...]) -> str:
    """The position whose cell is nearest to a match's centre."""
    row, column = (
        int(np.argmin([abs(place / length - cell) for cell in CELLS]))
        for place, length in ((match.y, shape[0]), (match.x, shape[1]))
    )
    return POSITIONS[3 * row + column]


def _background(picture: np.ndarray, backdrop: np.ndarray, free: np.ndarray) -> tuple[str, str]:
    """Colour and pattern of what is ``free`` (H, W): gradients slope, and stripes are whole columns."""
    if free.mean() < 0.2:
        free = np.ones_like(free)
    seen = picture[free].mean(0)
    colour = min(
        COLOURS, key=lambda name: float(np.square(_hue(np.asarray(COLOURS[name])) - _hue(seen)).sum())
    )
    grey, tone = picture.mean(-1), float(seen.mean())
    slope = float((backdrop[0] - backdrop[-1]).mean()) / tone
    plain, striped, checkered, gradient = BACKGROUNDS
    if slope > SLOPE:
        return colour, gradient
    rest = np.where(free, grey - backdrop.mean(-1), np.nan) / tone
    variance = float(np.nanvar(rest))
    if variance < (CONTRAST / 2) ** 2:
        return colour, plain
    share = max(float(_profile(rest, axis).var()) for axis in (0, 1)) / variance
    return colour, striped if share > 0.5 else checkered


def _hue(colour: np.ndarray) -> np.ndarray:
    return colour / colour.mean()


def _profile(grey: np.ndarray, axis: int) -> np.ndarray:
    """Means along ``axis`` of the lines of which at least a quarter is background."""
    known = np.isfinite(grey)
    enough = known.mean(axis) >= 0.25
    return np.nansum(grey, axis)[enough] / known.sum(axis)[enough]


def _motion(frames: Sequence[np.ndarray], name: str) -> str | None:
    """Where the object drifts over the whole clip, None for less than a third of the usual way."""
    times, centres = [], []
    for time, frame in enumerate(frames):
        backdrop = _backdrop(frame)
        match, share = _search(frame - backdrop, backdrop, name)
        if share >= PRESENT:
            times.append(time)
            centres.append((match.x / frame.shape[1], match.y / frame.shape[0]))
    if len(times) < 3:
        return None
    slope_x, slope_y = np.polyfit(times, np.asarray(centres), 1)[0] * (len(frames) - 1)
    across = abs(slope_x) >= abs(slope_y)
    slope = slope_x if across else slope_y
    if abs(slope) < 2 * TRAVEL / 3:
        return None
    step = (int(np.sign(slope)), 0) if across else (0, int(np.sign(slope)))
    return next(motion for motion, direction in MOTIONS.items() if direction == step)
