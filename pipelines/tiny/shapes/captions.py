"""Captions of scenes of shapes, and how to read them back."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from functools import cache

from .scenes import BACKGROUNDS, COLOURS, MOTIONS, POSITIONS, SHAPES, Scene

TEMPLATES = (
    "a {colour} {shape}{motion} at the {position} on a {background} background",
    "a {colour} {shape}{motion} in the {position} of a {background} background",
    "{colour} {shape}{motion}, {position}, {background} background",
    "on a {background} background, a {colour} {shape}{motion} at the {position}",
    "a {background} background with a {colour} {shape}{motion} in the {position}",
)
SYNONYMS: Mapping[str, str] = {
    "circle": "disc",
    "square": "box",
    "cross": "plus",
    "center": "middle",
    "striped": "stripy",
    "checkered": "checked",
    "plain": "grey",
    "purple": "violet",
}
EXTRA_WORDS = (
    *("an", "and", "are", "big", "image", "is", "moving", "object", "of"),
    *("one", "photo", "picture", "shape", "small", "the", "to", "video", "with"),
)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describes ``scene``: in canonical words, or with ``rng`` in a paraphrase drawn from it."""
    words = scene.attributes
    template = TEMPLATES[0]
    if rng is not None:
        template = rng.choice(TEMPLATES)
        words = {
            name: SYNONYMS[word] if word in SYNONYMS and rng.random() < 0.1 else word
            for name, word in words.items()
        }
    motion = f" moving {words['motion']}" if scene.motion else ""
    return template.format(**{**words, "motion": motion})


def read_caption(prompt: str) -> dict[str, str]:
    """The attributes that a caption of a bundled scene names, in canonical words: the inverse of `caption`.

    Raises:
        ValueError: a text of another form.
    """
    canonical = {other: word for word, other in SYNONYMS.items()}
    for form in _forms():
        if match := form.fullmatch(" ".join(prompt.lower().split())):
            words: dict[str, str | None] = match.groupdict()
            return {name: canonical.get(word, word) for name, word in words.items() if word is not None}
    raise ValueError(
        "attributes are read from captions such as 'a red circle at the top left on a striped background' "
        f"(of videos: 'a red circle moving up at ...'), got {prompt!r}"
    )


@cache
def _forms() -> tuple[re.Pattern, ...]:
    """The captions' templates with a group for each attribute."""
    values = {
        "colour": COLOURS,
        "shape": SHAPES,
        "position": POSITIONS,
        "background": BACKGROUNDS,
        "motion": MOTIONS,
    }
    groups = {}
    for name, words in values.items():
        known = [*words, *(SYNONYMS[word] for word in words if word in SYNONYMS)]
        groups[name] = f"(?P<{name}>{'|'.join(known)})"
    groups["motion"] = f"(?: moving {groups['motion']})?"
    return tuple(re.compile(template.format(**groups)) for template in TEMPLATES)


def vocabulary() -> list[str]:
    """Every word the models know, in a fixed order."""
    text = " ".join((*TEMPLATES, *COLOURS, *SHAPES, *POSITIONS, *BACKGROUNDS, *MOTIONS, *SYNONYMS.values()))
    words = {word.strip(",") for word in text.split() if "{" not in word}
    return sorted(words | set(EXTRA_WORDS))
