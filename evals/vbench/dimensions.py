"""Our own implementation of the VBench dimensions that need no weights, or those of transformers.

- temporal_flickering: (255 - mean absolute difference of successive frames) / 255; the mean over videos.
- subject_consistency: every frame but the first scores the mean of its features' cosines, at least 0, to
  those of the frame before it and of the first; the mean over frames of all videos. The features are DINO
  ViT-B/16's class token, of frames whose shorter side is 224.
- background_consistency: the same with CLIP ViT-B/32's image embedding of the central 224 x 224.

VBench resizes by torchvision and interpolates DINO's positions by torch.hub's code; here both are by torch
and transformers, so the consistencies may differ from VBench's in the last digits.

Source: VBench (arXiv 2311.17982), vbench/{temporal_flickering,subject_consistency,background_consistency}.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dit_accel.evals.metrics.features import Clip
from dit_accel.evals.metrics.folders import Store, Track, read, untracked
from dit_accel.files import digest
from dit_accel.scorers import pretrained
from dit_accel.scorers.pretrained import Sources

SIDE = 224
BATCH = 16  # frames
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Ready:
    """A dimension that is ready to run.

    Attributes:
        score: of the frames of a video, uint8 (frames, height, width, 3).
        settings: what a result has to say about it.
        by_frame: whether the mean over videos is weighted by their frames but the first.
    """

    score: Callable[[np.ndarray], float]
    settings: dict[str, Any]
    by_frame: bool


def flickering(frames: np.ndarray) -> float:
    """One minus the mean absolute difference of successive frames, in units of 255; 1 is a still."""
    errors = [np.abs(one.astype(np.int16) - other).mean() for one, other in pairwise(frames)]
    return float((255 - np.mean(errors)) / 255)


def consistency(features: torch.Tensor) -> float:
    """Mean cosine of frames to the one before and to the first, negative ones as 0.

    Args:
        features: (frames, d), at least two frames.
    """
    features = F.normalize(features.double(), dim=-1)
    before = (features[1:] * features[:-1]).sum(-1).clamp(min=0)
    first = (features[1:] * features[0]).sum(-1).clamp(min=0)
    return ((before + first) / 2).mean().item()


def _resized(frames: np.ndarray, device: torch.device, mode: str) -> torch.Tensor:
    """Frames uint8 (n, h, w, 3) as (n, 3, H, W) from 0 to 1, the shorter of H and W being `SIDE`."""
    height, width = frames.shape[1:3]
    short = min(height, width)
    size = (SIDE * height // short, SIDE * width // short)
    pixels = torch.tensor(frames, device=device).permute(0, 3, 1, 2).float()
    return F.interpolate(pixels, size, mode=mode, antialias=True, align_corners=False) / 255


def _normalised(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    centre, scale = (torch.tensor(values).view(3, 1, 1).to(pixels) for values in (mean, std))
    return (pixels - centre) / scale


def _over_batches(features: Callable[[np.ndarray], torch.Tensor]) -> Callable[[np.ndarray], float]:
    @torch.inference_mode()
    def score(frames: np.ndarray) -> float:
        batches = range(0, len(frames), BATCH)
        return consistency(torch.cat([features(frames[start : start + BATCH]) for start in batches]))

    return score


def _subject(sources: Sources, device: torch.device) -> Ready:
    from transformers import ViTModel

    # DINO has no pooling layer; without this, one with random weights would be added
    kind = SimpleNamespace(from_pretrained=partial(ViTModel.from_pretrained, add_pooling_layer=False))
    model = pretrained.DINO.load(kind, sources).to(device).eval()

    def features(frames: np.ndarray) -> torch.Tensor:
        pixels = _normalised(_resized(frames, device, "bilinear"), DINO_MEAN, DINO_STD)
        return model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]

    return Ready(_over_batches(features), _settings(pretrained.DINO, model, "bilinear"), by_frame=True)


def _background(sources: Sources, device: torch.device) -> Ready:
    from transformers import CLIPVisionModelWithProjection

    model = pretrained.CLIP_B32.load(CLIPVisionModelWithProjection, sources).to(device).eval()

    def features(frames: np.ndarray) -> torch.Tensor:
        pixels = _resized(frames, device, "bicubic")
        top, left = (round((size - SIDE) / 2) for size in pixels.shape[-2:])
        cut = pixels[..., top : top + SIDE, left : left + SIDE]
        return model(pixel_values=_normalised(cut, Clip.mean, Clip.std)).image_embeds

    settings = _settings(pretrained.CLIP_B32, model, "bicubic, cut to the centre")
    return Ready(_over_batches(features), settings, by_frame=True)


def _settings(weights: pretrained.HubModel, model: torch.nn.Module, resize: str) -> dict[str, Any]:
    backbone = {"backbone": weights.repository, "weights_sha256": pretrained.fingerprint(model)}
    return {**backbone, "resize": f"{resize}, shorter side {SIDE}", "over_videos": "mean over frames"}


def prepare(names: Sequence[str], sources: Sources, device: torch.device) -> dict[str, Ready]:
    """The named dimensions, with their weights loaded.

    Raises:
        UnavailableError: weights that are not here.
    """
    plain = Ready(flickering, {"backbone": None, "resize": None, "over_videos": "mean"}, by_frame=False)
    makers = {
        "temporal_flickering": lambda: plain,
        "subject_consistency": lambda: _subject(sources, device),
        "background_consistency": lambda: _background(sources, device),
    }
    return {name: makers[name]() for name in names}


def measure(
    videos: Mapping[str, Sequence[Path]],
    ready: Mapping[str, Ready],
    *,
    store: Store = Store(None),  # noqa: B008 (frozen)
    track: Track = untracked,
) -> dict[str, dict[str, Any]]:
    """Scores by dimension, each with `value`, `settings` and the scores of its videos.

    Args:
        videos: files by dimension, at least one each.

    Raises:
        ValueError: a video that cannot be read, or has a single frame.
    """
    answer = {}
    for name, one in ready.items():
        rows = []
        for path in track(videos[name], name):

            def compute(path: Path = path, one: Ready = one) -> np.ndarray:
                frames = read(path)
                if len(frames) < 2:
                    raise ValueError(f"{path} has {len(frames)} frame, and at least 2 are compared")
                return np.array([one.score(frames), len(frames) - 1])

            value, pairs = store.get(["vbench", name, one.settings, digest(path)], compute).tolist()
            rows.append({"name": path.name, "value": value, "weight": pairs if one.by_frame else 1})
        values, weights = ([row[key] for row in rows] for key in ("value", "weight"))
        mean = float(np.average(values, weights=weights))
        answer[name] = {"value": mean, "better": "higher", "settings": one.settings, "videos": rows}
    return answer
