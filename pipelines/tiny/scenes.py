"""Procedurally drawn, captioned scenes: the data set of the bundled models.

A scene is one object, or two, on a background. Places are fractions of the canvas, so that the same scene can
be drawn at any size and frame count; objects grow more slowly than the canvas (see `object_side`), and the
stripes and checks of a background not at all: a model sees them about as large at every size.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from .sprites import OBJECTS, place

ROWS = ("top", "", "bottom")
COLUMNS = ("left", "", "right")
POSITIONS = tuple(f"{row} {column}".strip() or "center" for row, column in product(ROWS, COLUMNS))
COLOURS: Mapping[str, tuple[float, float, float]] = {
    "grey": (0.70, 0.70, 0.70),
    "blue": (0.55, 0.70, 0.86),
    "green": (0.58, 0.80, 0.58),
    "pink": (0.86, 0.62, 0.74),
    "yellow": (0.86, 0.80, 0.52),
}
BACKGROUNDS = ("plain", "striped", "checkered", "gradient")
MOTIONS: Mapping[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

CELLS = (0.26, 0.5, 0.74)  # centres of the rows and columns
TRAVEL = 0.09  # how far a moving object is from its position in the first and the last frame
CONTRAST = 0.12  # of stripes and checks: half the difference between their two tones, by the mean
SLOPE = 0.3  # of gradients, likewise: lighter at the top
STRIPE = 16  # width of stripes and checks in pixels
TWO_OBJECTS = 0.5  # share of the images with two
HELD_OUT_ONE_IN = 8

Split = Literal["train", "held_out", "any"]


def object_side(height: int, width: int) -> float:
    """Side of objects in pixels on a canvas of this size: 31 on 64 pixels, 44 on 128, 76 on 384."""
    return 31 * (min(height, width) / 64) ** 0.5


@dataclass(frozen=True)
class Placed:
    """An object and its position; ``dx``, ``dy`` (of width and height) and ``scale`` are not captioned."""

    name: str
    position: str
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0

    def centre(self) -> tuple[float, float]:
        """Centre (x, y) in fractions of the canvas."""
        row, column = divmod(POSITIONS.index(self.position), 3)
        return CELLS[column] + self.dx, CELLS[row] + self.dy


@dataclass(frozen=True)
class Scene:
    """What is drawn: ``objects`` in reading order, one in videos; ``motion`` is None in still images.

    ``tone`` scales the background's colour and is not captioned.
    """

    objects: tuple[Placed, ...]
    colour: str
    background: str
    motion: str | None = None
    tone: float = 1.0

    @property
    def attributes(self) -> dict[str, str]:
        """The captioned attributes by name; a second object's, and ``motion``, only where there are such."""
        found = {"object": self.objects[0].name, "position": self.objects[0].position}
        if len(self.objects) > 1:
            found |= {"second object": self.objects[1].name, "second position": self.objects[1].position}
        found |= {"colour": self.colour, "background": self.background}
        return found if self.motion is None else {**found, "motion": self.motion}

    @property
    def held_out(self) -> bool:
        """Whether an object at this position, or with this motion there, is kept out of training."""
        keys = (f"{each.name} {each.position} {self.motion} {self.colour}" for each in self.objects)
        return any(zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0 for key in keys)

    def shift(self, time: float) -> tuple[float, float]:
        """How far (x, y) in fractions of the canvas objects are from their places at ``time`` in [0, 1]."""
        if self.motion is None:
            return 0.0, 0.0
        step_x, step_y = MOTIONS[self.motion]
        way = TRAVEL * (2 * time - 1)
        return step_x * way, step_y * way


def _far(first: str, second: str) -> bool:
    """Whether two positions are at opposite ends of a row, a column or both."""
    (row, column), (other_row, other_column) = (divmod(POSITIONS.index(one), 3) for one in (first, second))
    return max(abs(row - other_row), abs(column - other_column)) == 2


def sample(rng: random.Random, split: Split = "train", video: bool = False) -> Scene:
    """A random scene of ``split``, every attribute uniform but for the combinations the split leaves out.

    Two objects differ and stand at opposite sides. In videos an object may start or end its way a little over
    the canvas's edge.
    """
    jitter = 0.01 if video else 0.02

    def placed(name: str, position: str) -> Placed:
        dx, dy = rng.uniform(-jitter, jitter), rng.uniform(-jitter, jitter)
        return Placed(name, position, dx, dy, rng.uniform(0.93, 1.07))

    while True:
        objects = [placed(rng.choice(tuple(OBJECTS)), rng.choice(POSITIONS))]
        if not video and rng.random() < TWO_OBJECTS:
            first = rng.choice([one for one in POSITIONS if one != "center"])
            second = rng.choice([one for one in POSITIONS if _far(first, one)])
            names = rng.sample(tuple(OBJECTS), 2)
            objects = [placed(names[0], first), placed(names[1], second)]
            objects.sort(key=lambda each: POSITIONS.index(each.position))
        scene = Scene(
            objects=tuple(objects),
            colour=rng.choice(tuple(COLOURS)),
            background=rng.choice(BACKGROUNDS),
            motion=rng.choice(tuple(MOTIONS)) if video else None,
            tone=rng.uniform(0.94, 1.06),
        )
        if split == "any" or scene.held_out == (split == "held_out"):
            return scene


def _square_wave(pixels: np.ndarray, width: float) -> np.ndarray:
    """Anti-aliased alternation of +1 and -1 every ``width`` pixels."""
    stripe, phase = np.divmod(pixels / width, 1.0)
    inside = np.minimum(phase, 1 - phase) * width
    return np.where(stripe % 2 == 0, 1.0, -1.0) * np.clip(2 * inside, 0, 1)


def _backdrop(scene: Scene, x: np.ndarray, y: np.ndarray, height: int) -> np.ndarray:
    """The background alone (H, W, 3) at rows ``y`` and columns ``x`` of a canvas of ``height`` pixels."""
    pattern = np.zeros((len(y), len(x)), np.float32)
    if scene.background == "striped":
        pattern = pattern + CONTRAST * _square_wave(x, STRIPE)
    elif scene.background == "checkered":
        pattern = CONTRAST * _square_wave(x, STRIPE) * _square_wave(y, STRIPE)[:, None]
    elif scene.background == "gradient":
        pattern = pattern + SLOPE * (1 - 2 * y[:, None] / height)
    return np.clip(scene.tone * (1 + pattern)[..., None] * np.asarray(COLOURS[scene.colour]), 0, 1)


Window = tuple[slice, slice, slice]
WHOLE: Window = (slice(None), slice(None), slice(None))


def layers(
    scene: Scene, height: int, width: int, frames: int = 1, window: Window = WHOLE
) -> tuple[np.ndarray, np.ndarray]:
    """A scene's picture, as `render` returns it, and its objects' coverage (F, H, W) in [0, 1]."""
    y = (np.arange(height, dtype=np.float32) + 0.5)[window[1]]
    x = (np.arange(width, dtype=np.float32) + 0.5)[window[2]]
    backdrop = _backdrop(scene, x, y, height)
    images, covers = [], []
    for frame in range(frames)[window[0]]:
        shift_x, shift_y = scene.shift(frame / (frames - 1) if frames > 1 else 0.5)
        image, cover = backdrop.astype(np.float32), np.zeros((len(y), len(x)), np.float32)
        for each in scene.objects:
            centre_x, centre_y = each.centre()
            centre = ((centre_x + shift_x) * width, (centre_y + shift_y) * height)
            drawn = place(each.name, centre, each.scale * object_side(height, width), x, y)
            image = image * (1 - drawn[..., 3:]) + drawn[..., :3]
            cover = np.maximum(cover, drawn[..., 3])
        images.append(np.clip(image, 0, 1))
        covers.append(np.minimum(cover, 1))
    return np.stack(images), np.stack(covers)


def render(scene: Scene, height: int, width: int, frames: int = 1, window: Window = WHOLE) -> np.ndarray:
    """Draws ``scene``: float32 (frames, height, width, 3) in [0, 1], the motion spread over all frames.

    ``window`` (frames, rows, columns) draws that part only.
    """
    return layers(scene, height, width, frames, window)[0]
