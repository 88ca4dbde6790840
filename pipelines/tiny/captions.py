"""Captions of scenes, and how to read them back."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from functools import cache

from .scenes import BACKGROUNDS, COLOURS, MOTIONS, POSITIONS, Scene
from .sprites import OBJECTS

TEMPLATES = (
    "{objects} on a {colour} {background} background",
    "on a {colour} {background} background, {objects}",
    "a {colour} {background} background with {objects}",
)
PLACES = ("{object}{motion} at the {position}", "{object}{motion} in the {position}")
# elsewhere "a "
ARTICLES: Mapping[str, str] = {"umbrella": "an ", "octopus": "an ", "owl": "an ", "grapes": ""}
SYNONYMS: Mapping[str, str] = {
    "doughnut": "donut",
    "center": "middle",
    "striped": "stripy",
    "checkered": "checked",
    "grey": "gray",
}
EXTRA_WORDS = (
    *("and", "are", "big", "image", "is", "moving", "object", "of", "one", "photo", "picture"),
    *("small", "the", "to", "two", "video"),
)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describes ``scene``: in canonical words, or with ``rng`` in a paraphrase drawn from it."""

    def word(name: str) -> str:
        return SYNONYMS[name] if rng and name in SYNONYMS and rng.random() < 0.1 else name

    objects = list(scene.objects)
    if rng and rng.random() < 0.5:
        objects.reverse()
    phrases = [
        (rng.choice(PLACES) if rng else PLACES[0]).format(
            object=ARTICLES.get(each.name, "a ") + word(each.name),
            motion=f" moving {scene.motion}" if scene.motion else "",
            position=word(each.position),
        )
        for each in objects
    ]
    return (rng.choice(TEMPLATES) if rng else TEMPLATES[0]).format(
        objects=" and ".join(phrases), colour=word(scene.colour), background=word(scene.background)
    )


def read_caption(prompt: str) -> dict[str, str]:
    """The attributes that a caption of a bundled scene names, in canonical words: the inverse of `caption`.

    Raises:
        ValueError: a text of another form.
    """
    canonical = {other: word for word, other in SYNONYMS.items()}
    for form in _forms():
        if match := form.fullmatch(" ".join(prompt.lower().split())):
            words: dict[str, str | None] = match.groupdict()
            found = {name: canonical.get(word, word) for name, word in words.items() if word is not None}
            objects = [
                (found[f"object{index}"], found[f"position{index}"])
                for index in (1, 2)
                if f"object{index}" in found
            ]
            objects.sort(key=lambda each: POSITIONS.index(each[1]))
            attributes = {}
            for prefix, (name, position) in zip(("", "second "), objects, strict=False):
                attributes |= {f"{prefix}object": name, f"{prefix}position": position}
            rest = ("colour", "background", "motion")
            return attributes | {name: found[name] for name in rest if name in found}
    raise ValueError(
        "attributes are read from captions such as 'a fox at the top left on a blue striped background' "
        f"(with ' and a frog at the right' after the first object's place, and in videos with "
        f"' moving up' after the object), got {prompt!r}"
    )


@cache
def _forms() -> tuple[re.Pattern, ...]:
    """The captions' templates with a group for each attribute."""

    def group(name: str, words: Iterable[str]) -> str:
        known = [*words, *(SYNONYMS[word] for word in words if word in SYNONYMS)]
        return f"(?P<{name}>{'|'.join(known)})"

    def placed(index: int, motion: str) -> str:
        named, position = group(f"object{index}", OBJECTS), group(f"position{index}", POSITIONS)
        return f"(?:an? )?{named}{motion} (?:at|in) the {position}"

    objects = placed(1, f"(?: moving {group('motion', MOTIONS)})?") + f"(?: and {placed(2, '')})?"
    groups = {"colour": group("colour", COLOURS), "background": group("background", BACKGROUNDS)}
    return tuple(re.compile(template.format(objects=objects, **groups)) for template in TEMPLATES)


def vocabulary() -> list[str]:
    """Every word the models know, in a fixed order."""
    values = (*OBJECTS, *POSITIONS, *COLOURS, *BACKGROUNDS, *MOTIONS, *SYNONYMS.values(), *ARTICLES.values())
    text = " ".join((*TEMPLATES, *PLACES, *values))
    words = {word.strip(",") for word in re.sub(r"{\w+}", " ", text).split()}
    return sorted(words | set(EXTRA_WORDS))
