"""Scores of single images or videos: CLIP, PickScore, HPSv2, LAION aesthetics, ImageReward and TOPIQ.

A video scores the mean over its frames. The first four are the scorers of `dit_accel.scorers.image_scorers`;
the other two are computed by the packages of their authors, ImageReward and pyiqa. Image processors resize
and crop as published; TOPIQ sees pictures in their own size.

pyiqa 0.1.16 wants transformers 5, ImageReward 1.5 an older one: in one environment only one of them runs, and
`dit-accel eval report` puts both results into one table.

Source: ImageReward (arXiv 2304.05977), TOPIQ (arXiv 2308.03060); the others in `scorers`.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from PIL import Image

from dit_accel.errors import UnavailableError
from dit_accel.files import digest
from dit_accel.scorers import pretrained
from dit_accel.scorers.pretrained import Sources

from .bootstrap import mean_interval
from .catalogue import METRICS
from .folders import Folder, Store, Track, combined, read, untracked


@dataclass(frozen=True)
class Ready:
    """A score that is ready to run.

    Attributes:
        score: of frames, uint8 (frames, height, width, 3), and their prompt.
        settings: what a result has to say about it.
        tokenizer: what the prompt is read with; None if it is not read.
        longest: tokens of a prompt that are read.
    """

    score: Callable[[np.ndarray, str | None], float]
    settings: dict[str, Any]
    tokenizer: Any = None
    longest: int | None = None

    def cuts(self, prompt: str) -> bool:
        """Whether the end of a prompt is not read."""
        if self.tokenizer is None or self.longest is None:
            return False
        return len(self.tokenizer(prompt)["input_ids"]) > self.longest


# -- the models ----------------------------------------------------------------------------------------------


def _clip(name: str, sources: Sources, device: torch.device) -> Ready:
    """A scorer of the guidance, a batch of as many frames at a time as it looks at."""
    from dit_accel.scorers import image_scorers as scorers

    weights, processor = parts = pretrained.SCORERS[name]
    places = [part.place(sources) for part in parts]
    with _loading(weights.repository):
        here = all(part.found(sources) for part in parts)
        scorer = scorers.assemble(name, *places, device, allow_download=not here)

    def score(frames: np.ndarray, prompt: str | None) -> float:
        total = 0.0
        for start in range(0, len(frames), scorers.FRAMES):
            part = frames[start : start + scorers.FRAMES]
            (value,) = scorer(part[None].astype(np.float32) / 255, [prompt])
            total += value * len(part)
        return total / len(frames)

    words = sorted(scorer.tokenizer.get_vocab().items()) if scorer.tokenizer else []
    settings = {
        **_settings(weights, scorer.model),
        "processor": processor.repository,
        "processor_sha256": combined([scorer.images.to_json_string(), words]),
    }
    if scorer.tokenizer is None:
        return Ready(score, settings)
    return Ready(score, settings, scorer.tokenizer, scorer.longest)


def _image_reward(sources: Sources, device: torch.device) -> Ready:
    import ImageReward  # pyright: ignore[reportMissingImports]

    checkpoint, config = pretrained.IMAGE_REWARD.get(sources)
    with _loading(checkpoint):
        model = ImageReward.load(str(checkpoint), device=str(device), med_config=str(config))
        there = torch.load(checkpoint, map_location="cpu", weights_only=True)
        _refuse_missing(name for name, _ in model.named_parameters() if name not in there)

    @torch.inference_mode()
    def score(frames: np.ndarray, prompt: str | None) -> float:
        return float(np.mean([model.score(prompt, Image.fromarray(frame)) for frame in frames]))

    settings = {**_settings(pretrained.IMAGE_REWARD, model), "package": _package("image-reward")}
    return Ready(score, settings, model.blip.tokenizer, 35)  # tokens, by its `score`


def _topiq(sources: Sources, device: torch.device) -> Ready:
    import pyiqa  # pyright: ignore[reportMissingImports]

    (checkpoint,) = pretrained.TOPIQ.get(sources)
    with _loading(checkpoint):
        options = {"pretrained": False, "backbone_pretrain": False}  # pyiqa would download these
        metric = pyiqa.create_metric("topiq_nr", device=device, **options)
        metric.load_weights(str(checkpoint))  # all of them, strictly

    @torch.inference_mode()
    def score(frames: np.ndarray, prompt: str | None) -> float:
        pictures = (torch.tensor(frame, device=device).permute(2, 0, 1)[None] / 255 for frame in frames)
        return float(np.mean([metric(picture).item() for picture in pictures]))

    return Ready(score, {**_settings(pretrained.TOPIQ, metric.net), "package": _package("pyiqa")})


@contextlib.contextmanager
def _loading(what: object) -> Iterator[None]:
    """What goes wrong in there is `what` that cannot be loaded; what is printed goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except Exception as error:  # whatever packages raise
        raise UnavailableError(f"{what} cannot be loaded: {error}") from error


def _refuse_missing(names: Iterator[str]) -> None:
    first = next(names, None)
    if first is not None:  # it would stay random
        raise ValueError(f"the weights lack {first}")


def _settings(weights: pretrained.HubFiles, model: torch.nn.Module) -> dict[str, Any]:
    backbone = {"backbone": weights.repository, "weights_sha256": pretrained.fingerprint(model)}
    return {**backbone, "over_frames": "mean"}


def _package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} (version unknown)"


def prepare(names: Sequence[str], sources: Sources, device: torch.device) -> dict[str, Ready]:
    """The named scores, with their weights loaded.

    Raises:
        UnavailableError: weights that are not here, or cannot be loaded.
    """
    makers = {"image-reward": _image_reward, "topiq": _topiq}
    return {
        name: makers[name](sources, device) if name in makers else _clip(name, sources, device)
        for name in names
    }


# -- a folder ------------------------------------------------------------------------------------------------


def check(folder: Folder, frames: str, track: Track = untracked) -> None:
    """Reads every file once, before models are loaded.

    Raises:
        ValueError: one that cannot be read.
    """
    for path in track(folder.files, "check"):
        read(path, frames)


def measure(
    folder: Folder,
    ready: Mapping[str, Ready],
    prompts: Mapping[str, str],
    *,
    frames: str = "all",
    store: Store = Store(None),  # noqa: B008 (frozen)
    track: Track = untracked,
) -> list[dict[str, Any]]:
    """The scores of every file, as rows with `name`, `prompt` and a value by metric.

    Args:
        folder: of images and videos.
        ready: of `prepare`.
        prompts: by file name; empty if no metric needs them.
        frames: of a video.
        store: of finished files.
        track: shows progress.

    Raises:
        ValueError: a file that cannot be read, a prompt that is needed, or a score that is not finite.
    """
    rows = []
    for name in track(folder.names, "scores"):
        prompt, content = prompts.get(name), digest(folder.path / name)
        row: dict[str, Any] = {"name": name, "prompt": prompt}
        for metric, one in ready.items():

            def compute(one: Ready = one, metric: str = metric, row: dict[str, Any] = row) -> np.ndarray:
                value = one.score(read(folder.path / row["name"], frames), row["prompt"])
                if not math.isfinite(value):
                    raise ValueError(f"{row['name']}: {metric} gave {value}, which is no score")
                return np.array(value)

            judges_by = prompt if METRICS[metric].prompt else None
            if METRICS[metric].prompt and prompt is None:
                raise ValueError(f"{name}: {metric} judges by the prompt, and there is none")
            key = ["score", metric, one.settings, content, frames, judges_by]
            row[metric] = store.get(key, compute).item()
        rows.append(row)
    return rows


def summarise(rows: Sequence[dict[str, Any]], ready: Mapping[str, Ready]) -> dict[str, dict[str, Any]]:
    """Mean and range of each score over the files; one file alone has no interval."""
    answer = {}
    for metric, one in ready.items():
        values = np.array([row[metric] for row in rows])
        answer[metric] = {
            "value": float(values.mean()),
            "interval": mean_interval(values) if len(values) > 1 else None,
            "better": METRICS[metric].better,
            "lowest": float(values.min()),
            "highest": float(values.max()),
            "files": len(values),
            "settings": one.settings,
        }
    return answer


def cut_warnings(ready: Mapping[str, Ready], prompts: Mapping[str, str]) -> list[str]:
    """What is to be known of prompts that are longer than a score reads."""
    lines = []
    for metric, one in ready.items():
        cut = sum(map(one.cuts, set(prompts.values())))
        if cut:
            lines.append(f"{metric} read the first {one.longest} tokens of {cut} longer prompts")
    return lines
