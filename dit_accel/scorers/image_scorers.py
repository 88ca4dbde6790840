"""Trained scorers of images: the bundled scene encoder; CLIP, PickScore, HPSv2 and LAION aesthetics.

`SceneScorer` needs nothing but the package, and captions of bundled scenes. The others run in `transformers`:
three are CLIP models, exp(logit scale) x the cosine of image and prompt; aesthetics (version 2, linear, on
CLIP ViT-L/14) does not look at the prompt. A video scores the mean of a few of its frames.

Source: CLIP (arXiv 2103.00020), PickScore (arXiv 2305.01569), HPSv2 (arXiv 2306.09341),
https://github.com/christophschuhmann/improved-aesthetic-predictor.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection

from dit_accel.errors import UnavailableError
from dit_accel.pipelines.tiny.captions import read_caption

from . import scene_encoder
from .pretrained import SCORERS

FRAMES = 8  # of a video that are scored
SOURCES = {  # hub ids: of the weights, and of the image processor and tokenizer
    name: (weights.repository, processor.repository) for name, (weights, processor) in SCORERS.items()
}


class SceneScorer:
    """The objective `scenes`: how probable the bundled scene encoder finds what the caption says.

    score = mean over what the caption says of softmax(logits)[captioned value], in float64: what stands
    at each captioned position, that nothing stands at the other positions (their mean, as one attribute), the
    background's colour, and its kind. Where `attributes` counts what is right, this is smooth in every pixel.
    The encoder was trained to see through mild blur, noise and shifts of colour, and these hardly lower it.

    A video scores the mean of its frames. A moving object stays within the cell of its captioned position on
    its whole way, so all frames show the position, as in the encoder's training; no frame shows the motion,
    which is left out.

    Raises:
        ValueError: when called, a prompt that is no caption of a bundled scene of emoji, see `read_caption`.
    """

    name = "scenes"

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.encoder = scene_encoder.load().to(device)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, prompts: list[str]) -> list[float]:
        """One sample at a time: a score depends neither on the batch nor, by a copy, on its memory layout."""
        return [self._score(*sample) for sample in zip(pick_frames(images), prompts, strict=True)]

    def _score(self, frames: np.ndarray, prompt: str) -> float:
        pictures = torch.as_tensor(frames, dtype=torch.float32, device=self.device)
        pictures = pictures.permute(0, 3, 1, 2).contiguous()
        features = self.encoder(scene_encoder.resize(pictures) * 2 - 1)
        asked = scene_encoder.values(read_caption(prompt))
        odds = {
            name: head(features).double().softmax(1)[:, scene_encoder.CLASSES[name].index(asked[name])]
            for name, head in self.encoder.classes.items()
        }
        empty = [odds.pop(name) for name, value in asked.items() if value == scene_encoder.EMPTY]
        return torch.stack([*odds.values(), torch.stack(empty).mean(0)]).mean().item()


class AestheticsModel(CLIPVisionModelWithProjection):
    """A CLIP image encoder and five linear layers; module names are those of the published weights."""

    def __init__(self, config):
        super().__init__(config)
        widths = (config.projection_dim, 1024, 128, 64, 16, 1)
        first, second, third, fourth, last = (nn.Linear(*pair) for pair in pairwise(widths))
        dropout = nn.Identity()  # of training, which counts in the names
        self.layers = nn.Sequential(first, dropout, second, dropout, third, dropout, fourth, last)
        self.post_init()


class Scorer:
    """A trained scorer as an objective, see `dit_accel.guidance.objectives`."""

    def __init__(self, name: str, model: Any, images: Any, tokenizer: Any):
        self.name, self.model, self.images, self.tokenizer = name, model.eval(), images, tokenizer

    @property
    def longest(self) -> int:
        """How many tokens of a prompt are read."""
        return self.model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, prompts: list[str]) -> list[float]:
        videos = pick_frames(images)
        frames = (videos.reshape(-1, *videos.shape[2:]).clip(0, 1) * 255).round().astype(np.uint8)
        pixels = self.images(images=list(frames), return_tensors="pt")["pixel_values"].to(self.model.device)
        scores = self._aesthetics(pixels) if self.tokenizer is None else self._match(pixels, prompts)
        return scores.double().view(len(videos), -1).mean(1).tolist()

    def _aesthetics(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.layers(
            nn.functional.normalize(self.model(pixel_values=pixels).image_embeds, dim=-1)
        )

    def _match(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": self.longest}
        options |= {"return_tensors": "pt", "return_token_type_ids": False}
        text = self.tokenizer(prompts, **options).to(self.model.device)
        out = self.model(pixel_values=pixels, **text)
        each = out.text_embeds.repeat_interleave(len(pixels) // len(prompts), 0)
        return self.model.logit_scale.exp() * (out.image_embeds * each).sum(-1)


def pick_frames(images: np.ndarray) -> np.ndarray:
    """What is scored of images (B, H, W, 3) or videos (B, T, H, W, 3): (B, n, H, W, 3), n up to `FRAMES`."""
    videos = images if images.ndim == 5 else images[:, None]
    count = videos.shape[1]
    return videos[:, np.linspace(0, count - 1, min(FRAMES, count)).round().astype(int)]


def load(
    name: str, folder: str | None = None, device: str | torch.device = "cpu", allow_download: bool = False
) -> Scorer:
    """The scorer called `name`, from a folder or from the Hugging Face cache (or hub, if that is allowed).

    Raises:
        UnavailableError: its files are not there.
    """
    weights, processor = (folder, folder) if folder else SOURCES[name]
    try:
        return assemble(name, weights, processor, device, allow_download)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnavailableError(_missing(name, folder, allow_download, reason)) from error


def assemble(
    name: str, weights: str, processor: str, device: str | torch.device, allow_download: bool
) -> Scorer:
    """The scorer called `name`, of weights, and image processor and tokenizer, in folders or repositories.

    Raises:
        OSError, ValueError: files that are missing, or that lack some of the weights.
    """
    kind = AestheticsModel if name == "aesthetics" else CLIPModel
    options = {"local_files_only": not allow_download}
    images = AutoImageProcessor.from_pretrained(processor, **options)
    tokenizer = None if name == "aesthetics" else AutoTokenizer.from_pretrained(processor, **options)
    loaded: Any = kind.from_pretrained(weights, output_loading_info=True, **options)
    model, info = loaded
    if info["missing_keys"]:  # transformers would leave these random
        raise ValueError(f"the weights lack {min(info['missing_keys'])}")
    return Scorer(name, model.to(device), images, tokenizer)


def _missing(name: str, folder: str | None, allow_download: bool, reason: str) -> str:
    if folder:
        state = "is no such folder" if not Path(folder).is_dir() else "does not hold them"
        return (
            f"objective {name!r} needs weights, image processor and tokenizer in the format of transformers, "
            f"and {folder} {state}: {reason}"
        )
    repositories = " and ".join(dict.fromkeys(SOURCES[name]))
    downloads = "; ".join(f"hf download {source}" for source in dict.fromkeys(SOURCES[name]))
    remedy = "" if allow_download else ", allow the download (--allow-download)"
    return (
        f"objective {name!r} needs {repositories}, which the Hugging Face cache here does not hold: fetch it "
        f"({downloads}){remedy}, or name a folder that holds its files ({name}:FOLDER); {reason}"
    )
