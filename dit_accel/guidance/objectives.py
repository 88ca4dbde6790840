"""What a head search maximises: callables of images and prompts that give one score per sample.

    objective(images, prompts) -> floats

`images` are floats in [0, 1], (B, H, W, 3), or (B, T, H, W, 3) for videos; `prompts` a list of B texts. Any
such callable will do. It is known by its attribute `name`, else by its own name, in logs and caches: give it
another one whenever it computes something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Objective = Callable[[np.ndarray, list[str]], Sequence[float]]
BUNDLED = ("attributes", "scenes")  # of captions of the bundled scenes; the others know any prompt
NAMES = (*BUNDLED, "clip", "pickscore", "aesthetics", "hpsv2")


def named(text: str, device: str | torch.device = "cpu", allow_download: bool = False) -> Objective:
    """A built-in objective.

    Args:
        text: one of `NAMES`, or a name and a folder with its weights, as in `"clip:/models/clip"`; those of
            `scenes` are bundled.
        device: where a trained scorer runs.
        allow_download: whether its weights may be fetched from the Hugging Face hub; if not, they must be in
            the folder or in the local cache.

    Raises:
        ValueError: an unknown name.
        UnavailableError: weights that are not there.
    """
    name, _, folder = text.partition(":")
    if name not in NAMES or (folder and name in BUNDLED):
        raise ValueError(
            f"an objective must be one of {', '.join(NAMES)}; those after {BUNDLED[-1]} may have a folder, "
            f"as in clip:/models/clip; got {text!r}"
        )
    if name == "attributes":
        return attributes
    from dit_accel.scorers.image_scorers import SceneScorer, load

    if name == "scenes":
        return SceneScorer(device)
    return load(name, folder or None, device, allow_download)


def name_of(objective: Objective) -> str:
    """What an objective is called.

    Raises:
        TypeError: it has no name, or one that says nothing.
    """
    name = getattr(objective, "name", None) or getattr(objective, "__qualname__", None)
    if not isinstance(name, str) or "<lambda>" in name:
        raise TypeError(
            f"logs and caches know an objective by its name; give {objective!r} an attribute `name`"
        )
    return name


def attributes(images: np.ndarray, prompts: list[str]) -> list[float]:
    """The share of captioned attributes that a rule-based checker finds right; for bundled models.

    Raises:
        ValueError: a prompt that is not a caption of a bundled scene, see `read_caption`.
    """
    from dit_accel.pipelines.tiny import check, read_caption

    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        seen, asked = check(image), read_caption(prompt)
        scores.append(fmean(seen.get(name) == value for name, value in asked.items()))
    return scores


class HarmonicMean:
    """The harmonic mean of several objectives, sample by sample, on their raw scores.

    Raises:
        ValueError: fewer than two objectives, or a score that is not positive.
    """

    def __init__(self, objectives: Sequence[Objective]):
        if len(objectives) < 2:
            raise ValueError(f"a harmonic mean needs at least two objectives, got {len(objectives)}")
        self.objectives = tuple(objectives)
        self.name = f"harmonic mean of {', '.join(map(name_of, objectives))}"

    def __call__(self, images: np.ndarray, prompts: list[str]) -> list[float]:
        scores = [objective(images, prompts) for objective in self.objectives]
        for objective, row in zip(self.objectives, scores, strict=True):
            if min(row) <= 0:
                raise ValueError(
                    f"a harmonic mean needs positive scores, and {name_of(objective)} gave {min(row)}"
                )
        return [len(row) / sum(1 / score for score in row) for row in zip(*scores, strict=True)]
