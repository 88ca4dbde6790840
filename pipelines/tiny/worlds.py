"""What the bundled models draw: emoji, or the coloured shapes that models not trained anew still know.

With the last of those, `SHAPES` and the package `shapes` go, and this module with them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import captions, checker, scenes
from .shapes import captions as shapes_captions
from .shapes import checker as shapes_checker
from .shapes import scenes as shapes_scenes

AnyScene = scenes.Scene | shapes_scenes.Scene


@dataclass(frozen=True)
class World:
    """A kind of scenes: how they are drawn, described and recognised."""

    name: str
    sample: Callable[..., Any]
    render: Callable[..., np.ndarray]
    caption: Callable[..., str]
    read_caption: Callable[[str], dict[str, str]]
    check: Callable[[np.ndarray], checker.Prediction]
    vocabulary: Callable[[], list[str]]


EMOJI = World(
    "emoji",
    scenes.sample,
    scenes.render,
    captions.caption,
    captions.read_caption,
    checker.check,
    captions.vocabulary,
)
SHAPES = World(
    "shapes",
    shapes_scenes.sample,
    shapes_scenes.render,
    shapes_captions.caption,
    shapes_captions.read_caption,
    shapes_checker.check,
    shapes_captions.vocabulary,
)


def world_of(pipe: Any) -> World:
    """What a bundled model draws, by the words that it knows."""
    return SHAPES if "circle" in pipe.tokenizer.get_vocab() else EMOJI


def world_of_caption(prompt: str) -> World:
    """The world whose captions have the form of ``prompt``.

    Raises:
        ValueError: a text of another form.
    """
    errors = []
    for world in (EMOJI, SHAPES):
        try:
            world.read_caption(prompt)
        except ValueError as error:
            errors.append(str(error))
        else:
            return world
    raise ValueError(errors[-1])


def read_caption(prompt: str) -> dict[str, str]:
    """The attributes that a caption of a bundled scene names, in canonical words: the inverse of `caption`.

    Raises:
        ValueError: a text of another form.
    """
    return world_of_caption(prompt).read_caption(prompt)


def caption(scene: AnyScene, rng: random.Random | None = None) -> str:
    """Describes ``scene``: in canonical words, or with ``rng`` in a paraphrase drawn from it."""
    return (SHAPES if isinstance(scene, shapes_scenes.Scene) else EMOJI).caption(scene, rng)


def render(scene: AnyScene, height: int, width: int, frames: int = 1) -> np.ndarray:
    """Draws ``scene``: float32 (frames, height, width, 3) in [0, 1], the motion spread over all frames."""
    world = SHAPES if isinstance(scene, shapes_scenes.Scene) else EMOJI
    return world.render(scene, height, width, frames)
