"""Small distillations: prompts as embeddings, calls and recipes of the random pipelines of the fixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dit_accel import Recipe
from dit_accel.distillation.run import Distillation
from dit_accel.distillation.settings import Settings
from dit_accel.patterns import Clear

RECIPE = Recipe(Clear(1.5), order="tile", block_size=(16, 16), dense_steps=1)
POOLED = Recipe(Clear(1.5, downsample=3), order="tile", block_size=(16, 16), dense_steps=1)
SMALL = {"steps": 4, "batch": 2, "rank": 2, "rate": 0.02, "empty": 0, "held_out": 1, "precision": "fp32"}


def prompts(family: str, count: int = 3, tokens: int = 7) -> list[dict[str, Any]]:
    """Text embeddings, which the random pipelines take in the place of texts."""
    found = []
    for number in range(count):
        x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(number))
        one = {"prompt_embeds": x}
        if family != "wan":
            one["pooled_prompt_embeds"] = x[:, 0]
        if family == "sd3":
            one |= {"negative_prompt_embeds": -x, "negative_pooled_prompt_embeds": -x[:, 0]}
        if family == "hunyuan":
            one["prompt_attention_mask"] = (torch.arange(tokens) < tokens - 2).long()[None]
        found.append(one)
    return found


def call(family: str) -> dict[str, Any]:
    """Of the pipeline's call: 6 x 8 tokens, of videos in 2 frames of latents, in two steps."""
    found = {"height": 96, "width": 128, "num_inference_steps": 2}
    found |= {"num_frames": 5} if family in ("wan", "hunyuan") else {}
    scale = {"sd3": 4.0, "wan": 1.0}.get(family)
    return found if scale is None else found | {"guidance_scale": scale}


def distillation(
    pipe: Any, family: str, folder: Path, recipe: Recipe = RECIPE, **options: Any
) -> Distillation:
    """One that is prepared; its samples are shared by all in `folder`'s parent."""
    settings = Settings(**{**SMALL, **options})
    job = Distillation(pipe, recipe, settings, call(family), folder / "out", folder / "state", None)
    job.prepare(prompts(family), progress=False)
    return job
