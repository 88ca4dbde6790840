"""Images of prompts and seeds under a perturbation, and their scores, kept so that none is made twice.

Each image is a PNG in a folder (a video: its frames below each other), named by a digest of all that made
it: weights, recipe, arguments of the pipeline, perturbation, prompt and seed. A JSON of the same name says
what it is and holds its scores. Both are written atomically, so processes may share the folder, and what a
run that was stopped has made is used by the next.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dit_accel import media
from dit_accel.files import atomic
from dit_accel.json_files import read_json, write_json
from dit_accel.patterns import Dense
from dit_accel.recipe.recipe import Recipe
from dit_accel.runtime.switching import accelerated, handle_of
from dit_accel.seeds import generator

from .objectives import Objective, name_of
from .perturbation import HeadPerturbation

_VALUES = 64  # of each weight that tell models apart


class Pair(NamedTuple):
    """A prompt and the seed of the noise it starts from."""

    prompt: str
    seed: int


def generate(pipe: Any, prompts: list[str], seeds: list[int], **call: Any) -> np.ndarray:
    """Calls a pipeline on a batch, one generator each: floats (B, H, W, 3), for videos (B, T, H, W, 3)."""
    if isinstance(call.get("negative_prompt"), str):
        call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
    generators = [generator(seed) for seed in seeds]
    output = pipe(prompt=prompts, generator=generators, output_type="np", **call)
    return np.asarray(output.frames if hasattr(output, "frames") else output.images)


class Trials:
    """Generates and scores samples, or finds them in its folder.

    What is enabled on the pipeline stays in force. Scores are of the 8-bit images that are kept, so it makes
    no difference whether an image is new.

    Args:
        pipe: a diffusers pipeline.
        objectives: see `dit_accel.guidance.objectives`.
        folder: where images and scores are kept.
        call: more arguments of the pipeline (steps, size, guidance scale), plain data.
        generate: like `generate` of this module, for pipelines that are called in another way.
        batch: samples generated at once.

    Raises:
        TypeError: a `call` that is not plain data, or an objective without a name.
        ValueError: `batch` below 1.
    """

    def __init__(
        self,
        pipe: Any,
        objectives: Sequence[Objective],
        folder: str | Path,
        *,
        call: Mapping[str, Any] | None = None,
        generate: Callable[..., np.ndarray] = generate,
        batch: int = 5,
    ):
        if batch < 1:
            raise ValueError(f"`batch` must be at least 1, got {batch}")
        self.pipe, self.folder, self.batch = pipe, Path(folder), batch
        self.objectives = {name_of(objective): objective for objective in objectives}
        self._call, self._generate = dict(call or {}), generate
        before = handle_of(pipe)
        self._recipe = replace(Recipe(Dense()) if before is None else before.recipe, guidance=None)
        self.made_by = {
            "model": fingerprint(pipe),
            "device": pipe._execution_device.type,
            "recipe": self._recipe.content,
            "call": self._call,
            "generate": name_of(generate),
            "batch": batch,
        }
        try:
            json.dumps(self.made_by)
        except TypeError as error:
            raise TypeError(f"`call` must hold plain data, got {self._call!r}: {error}") from None

    def batches(self, pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
        """The pairs in the batches in which they are generated."""
        return [pairs[start : start + self.batch] for start in range(0, len(pairs), self.batch)]

    def score(self, perturbation: HeadPerturbation | None, pairs: Sequence[Pair]) -> list[dict[str, float]]:
        """The score of every pair by objective, under a perturbation or without guidance, of one batch.

        Raises:
            ValueError: a model that returns values that are not finite, or an objective that does not return
                one finite number per image.
        """
        records = [self._record(perturbation, pair) for pair in pairs]
        missing = [name for name in self.objectives if any(name not in record for record in records)]
        if missing:
            images = self._images(perturbation, pairs)
            for name in missing:
                values = self._judge(name, images, [pair.prompt for pair in pairs])
                for record, value in zip(records, values, strict=True):
                    record[name] = value
            for pair, record in zip(pairs, records, strict=True):
                self._keep(perturbation, pair, record)
        return records

    def image(self, perturbation: HeadPerturbation | None, pair: Pair) -> np.ndarray | None:
        """The kept image, uint8 (H, W, 3) or (T, H, W, 3), or None."""
        path = self._path(perturbation, pair, ".png")
        if not path.exists():
            return None
        try:
            with Image.open(path, formats=("PNG",)) as picture:
                pixels, frames = np.asarray(picture), int(picture.text["frames"])
        except Exception as error:  # Pillow raises whatever a damaged file leads it to
            raise ValueError(f"the kept image {path} is damaged ({error}); delete it") from error
        return pixels.reshape(frames, -1, *pixels.shape[1:]) if frames else pixels

    def generate(self, perturbation: HeadPerturbation | None, pairs: Sequence[Pair]) -> np.ndarray:
        """New samples, as `generate` of this module returns them; they are not kept."""
        prompts, seeds = (list(values) for values in zip(*pairs, strict=True))
        with accelerated(self.pipe, replace(self._recipe, guidance=perturbation)):
            return self._generate(self.pipe, prompts, seeds, **self._call)

    # -- making --------------------------------------------------------------------------------------------

    def _images(self, perturbation: HeadPerturbation | None, pairs: Sequence[Pair]) -> np.ndarray:
        """uint8 (B, H, W, 3) or (B, T, H, W, 3), kept or generated."""
        kept = [self.image(perturbation, pair) for pair in pairs]
        if all(image is not None for image in kept):
            return np.stack(kept)
        samples = self.generate(perturbation, pairs)
        if not np.isfinite(samples).all():
            heads = "no guidance" if perturbation is None else f"{list(perturbation.heads)} perturbed"
            raise ValueError(f"with {heads} the model returned values that are not finite; lower `scale`")
        images = media.to_uint8(samples)
        for pair, pixels in zip(pairs, images, strict=True):
            about = PngInfo()
            about.add_text("frames", str(len(pixels) if pixels.ndim == 4 else 0))
            with atomic(self._path(perturbation, pair, ".png")) as partial:
                Image.fromarray(pixels.reshape(-1, *pixels.shape[-2:])).save(partial, pnginfo=about)
        return images

    def _judge(self, name: str, images: np.ndarray, prompts: list[str]) -> list[float]:
        scores = [float(score) for score in self.objectives[name](images.astype(np.float32) / 255, prompts)]
        if len(scores) != len(prompts) or not all(map(math.isfinite, scores)):
            raise ValueError(
                f"objective {name!r} must return a finite number for each image, of which there are "
                f"{len(prompts)}, got {scores}"
            )
        return scores

    # -- files ---------------------------------------------------------------------------------------------

    def _path(self, perturbation: HeadPerturbation | None, pair: Pair, suffix: str) -> Path:
        plain = None if perturbation is None else perturbation.to_dict()
        content = json.dumps([self.made_by, plain, *pair], sort_keys=True)
        return self.folder / (hashlib.sha256(content.encode()).hexdigest()[:24] + suffix)

    def _record(self, perturbation: HeadPerturbation | None, pair: Pair) -> dict[str, float]:
        path = self._path(perturbation, pair, ".json")
        if not path.exists():
            return {}
        try:
            scores = read_json(path)["scores"]
            if not all(math.isfinite(score) for score in scores.values()):
                raise ValueError("a score is no finite number")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the kept scores {path} are damaged ({error}); delete them") from error
        return scores

    def _keep(self, perturbation: HeadPerturbation | None, pair: Pair, scores: dict[str, float]) -> None:
        plain = None if perturbation is None else perturbation.to_dict()
        about = {**pair._asdict(), "guidance": plain, "scores": scores}
        write_json(self._path(perturbation, pair, ".json"), about)


def fingerprint(pipe: Any) -> str:
    """A digest that tells pipelines apart: configurations, and the first values of every weight."""
    digest = hashlib.sha256(type(pipe).__name__.encode())
    for name, part in sorted(pipe.components.items()):
        digest.update(f"{name} {type(part).__name__}".encode())
        if isinstance(config := getattr(part, "config", None), Mapping):
            settings = {key: value for key, value in config.items() if not key.startswith("_")}
            digest.update(json.dumps(settings, sort_keys=True, default=repr).encode())
        if isinstance(part, torch.nn.Module):
            for key, weight in part.state_dict().items():
                digest.update(f"{key} {weight.dtype} {tuple(weight.shape)}".encode())
                if type(weight) is torch.Tensor and not weight.is_meta:  # not offloaded or quantized
                    digest.update(weight.flatten()[:_VALUES].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
