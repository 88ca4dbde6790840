"""The objects that scenes are made of: Noto emoji (Google, Apache License 2.0) in ``sprites.png``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

OBJECTS: Mapping[str, str] = {  # by word of a caption: the emoji's name in Iconify's collection "noto"
    "heart": "red-heart",
    "star": "star",
    "frog": "frog",
    "pig": "pig-face",
    "panda": "panda",
    "fox": "fox",
    "butterfly": "butterfly",
    "mushroom": "mushroom",
    "grapes": "grapes",
    "tree": "evergreen-tree",
    "penguin": "penguin",
    "sunflower": "sunflower",
    "watermelon": "watermelon",
    "umbrella": "umbrella",
    "moon": "crescent-moon",
    "doughnut": "doughnut",
    "strawberry": "strawberry",
    "turtle": "turtle",
    "cactus": "cactus",
    "octopus": "octopus",
    "owl": "owl",
    "rocket": "rocket",
    "ladybug": "lady-beetle",
    "crown": "crown",
}
SHEET = Path(__file__).parent / "sprites.png"
SIDE, COLUMNS = 128, 4  # of a sprite in pixels, and of the sheet in sprites


@cache
def sprites() -> Mapping[str, np.ndarray]:
    """Sprites by name: float32 (128, 128, 4), colours in [0, 1] times coverage, then coverage."""
    with Image.open(SHEET) as sheet:
        pixels = np.asarray(sheet.convert("RGBA"), np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    found = {}
    for index, name in enumerate(OBJECTS):
        row, column = divmod(index, COLUMNS)
        found[name] = pixels[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
    return found


def resampling(places: np.ndarray, side: float, length: int = SIDE) -> np.ndarray:
    """Weights (places, length) that read a line of ``length`` samples, scaled to ``side`` pixels.

    ``places`` are pixels' centres in pixels from the line's start. The filter is a triangle as wide as a
    pixel or a sample, whichever is wider; beyond its ends a line is 0.
    """
    width = max(1.0, length / side)
    margin = int(width) + 1
    samples = np.arange(-margin, length + margin) + 0.5
    weights = np.clip(1 - abs(places[:, None] * (length / side) - samples) / width, 0, None)
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-6)
    return weights[:, margin:-margin].astype(np.float32)


def place(name: str, centre: tuple[float, float], side: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A sprite ``side`` pixels wide around ``centre``, sampled at ``y`` (H,) and ``x`` (W,): (H, W, 4)."""
    across = resampling(x - centre[0] + side / 2, side)
    down = resampling(y - centre[1] + side / 2, side)
    rows = (down @ sprites()[name].reshape(SIDE, -1)).reshape(len(y), SIDE, 4)
    return (rows.transpose(0, 2, 1) @ across.T).transpose(0, 2, 1)
