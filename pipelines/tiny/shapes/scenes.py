"""Procedurally drawn, captioned scenes: the data set of the bundled models.

A scene is one coloured shape on a grey background. All lengths are fractions of the canvas, so the same scene
can be drawn at any size and frame count. For a pixel at signed distance ``d`` (in pixels) from an outline,
the coverage is ``clip(1/2 - d, 0, 1)``, which anti-aliases every edge at every size.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.88, 0.13, 0.15),
    "yellow": (0.95, 0.83, 0.12),
    "green": (0.12, 0.68, 0.25),
    "cyan": (0.10, 0.78, 0.85),
    "blue": (0.15, 0.25, 0.90),
    "purple": (0.65, 0.15, 0.80),
}
SHAPES = ("circle", "square", "triangle", "cross")
ROWS = ("top", "", "bottom")
COLUMNS = ("left", "", "right")
POSITIONS = tuple(f"{row} {column}".strip() or "center" for row, column in product(ROWS, COLUMNS))
BACKGROUNDS = ("plain", "striped", "checkered")
MOTIONS: Mapping[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

CELLS = (0.26, 0.5, 0.74)  # centres of the rows and columns
TRAVEL = 0.09  # how far a moving object is from its position in the first and the last frame
CONTRAST = 0.15  # of stripes and checks: half the difference between their two greys
STRIPES = 8  # across the shorter side
HELD_OUT_ONE_IN = 8

Split = Literal["train", "held_out", "any"]


@dataclass(frozen=True)
class Scene:
    """What is drawn: the captioned attributes, and jitter that the caption does not mention.

    ``motion`` is None in still images. ``dx``, ``dy`` are fractions of width and height, ``radius`` of the
    shorter side; ``tone`` is the mean grey of the background.
    """

    colour: str
    shape: str
    position: str
    background: str
    motion: str | None = None
    dx: float = 0.0
    dy: float = 0.0
    radius: float = 0.16
    tone: float = 0.6

    @property
    def attributes(self) -> dict[str, str]:
        """The captioned attributes by name, ``motion`` only where there is one."""
        names = ("colour", "shape", "position", "background", "motion")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def held_out(self) -> bool:
        """Whether this combination of colour, shape, position and motion is held out of training."""
        key = f"{self.colour} {self.shape} {self.position} {self.motion}"
        return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0

    def centre(self, time: float = 0.5) -> tuple[float, float]:
        """Centre (x, y) in fractions of the canvas at ``time`` in [0, 1]."""
        row, column = divmod(POSITIONS.index(self.position), 3)
        x, y = CELLS[column] + self.dx, CELLS[row] + self.dy
        if self.motion is not None:
            step_x, step_y = MOTIONS[self.motion]
            x, y = x + step_x * TRAVEL * (2 * time - 1), y + step_y * TRAVEL * (2 * time - 1)
        return x, y


def sample(rng: random.Random, split: Split = "train", video: bool = False) -> Scene:
    """A random scene of ``split``, every attribute uniform but for the combinations the split leaves out.

    In videos an object may start or end its way a little over the canvas's edge.
    """
    jitter, radius = (0.01, (0.16, 0.19)) if video else (0.03, (0.15, 0.19))
    while True:
        scene = Scene(
            colour=rng.choice(tuple(COLOURS)),
            shape=rng.choice(SHAPES),
            position=rng.choice(POSITIONS),
            background=rng.choice(BACKGROUNDS),
            motion=rng.choice(tuple(MOTIONS)) if video else None,
            dx=rng.uniform(-jitter, jitter),
            dy=rng.uniform(-jitter, jitter),
            radius=rng.uniform(*radius),
            tone=rng.uniform(0.35, 0.75),
        )
        if split == "any" or scene.held_out == (split == "held_out"):
            return scene


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance, negative inside, from the outline of a shape that fits a square of side 2 * radius."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.88 * radius
    if shape == "triangle":
        side, base = 2 / 5**0.5 * (abs(x) - (y + radius) / 2), y - 0.9 * radius
        return np.maximum(side, base)
    if shape == "cross":
        arm = 0.34 * radius
        return np.minimum(
            np.maximum(abs(x) - radius, abs(y) - arm), np.maximum(abs(x) - arm, abs(y) - radius)
        )
    raise ValueError(f"`shape` must be one of {SHAPES}, got {shape!r}")


def _square_wave(pixels: np.ndarray, width: float) -> np.ndarray:
    """Anti-aliased alternation of +1 and -1 every ``width`` pixels."""
    stripe, phase = np.divmod(pixels / width, 1.0)
    inside = np.minimum(phase, 1 - phase) * width
    return np.where(stripe % 2 == 0, 1.0, -1.0) * np.clip(2 * inside, 0, 1)


def render(
    scene: Scene,
    height: int,
    width: int,
    frames: int = 1,
    window: tuple[slice, slice, slice] = (slice(None), slice(None), slice(None)),
) -> np.ndarray:
    """Draws ``scene``: float32 (frames, height, width, 3) in [0, 1], the motion spread over all frames.

    ``window`` (frames, rows, columns) draws that part only.
    """
    y = (np.arange(height, dtype=np.float32) + 0.5)[window[1], None]
    x = (np.arange(width, dtype=np.float32) + 0.5)[None, window[2]]
    shorter = min(height, width)

    pattern = np.zeros((len(y), x.shape[1]), np.float32)
    if scene.background == "striped":
        pattern = pattern + _square_wave(x, shorter / STRIPES)
    elif scene.background == "checkered":
        pattern = _square_wave(x, shorter / STRIPES) * _square_wave(y, shorter / STRIPES)
    grey = (scene.tone + CONTRAST * pattern)[..., None]

    colour = np.asarray(COLOURS[scene.colour], np.float32)
    images = []
    for frame in range(frames)[window[0]]:
        centre_x, centre_y = scene.centre(frame / (frames - 1) if frames > 1 else 0.5)
        distance = _distance(scene.shape, x - centre_x * width, y - centre_y * height, scene.radius * shorter)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        images.append(grey + cover * (colour - grey))
    return np.stack(images).astype(np.float32)
