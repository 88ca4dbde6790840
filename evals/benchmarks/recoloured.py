"""A fine-tuned copy of a bundled model: its weights learn to draw the same scenes in exchanged colours."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from dit_accel import media
from dit_accel.distillation.folders import read_folder
from dit_accel.distillation.samples import encoded
from dit_accel.distillation.steps import Batch, noise_level
from dit_accel.pipelines import family_of
from dit_accel.training_loop import Draw


def exchanged(pictures: np.ndarray, back: bool = False) -> np.ndarray:
    """Pictures (..., 3) with red as green, green as blue and blue as red; or the way back."""
    return np.roll(pictures, -1 if back else 1, axis=-1)


def recoloured(pipe: Any, drawn: Path, out: Path, call: Mapping[str, Any], steps: int, batch: int) -> Path:
    """Tunes a pipeline's transformer on scenes in exchanged colours, and saves it; made once.

    Args:
        pipe: the pipeline, which is changed.
        drawn: folder of scenes and captions.
        out: pipeline folder to write; beside it are the pictures and their latents.
        call: arguments of the pipeline's call.
        steps: of AdamW at a rate of 3e-4, in bf16 beside weights of fp32.
        batch: samples of a step.
    """
    if out.is_dir():
        return out
    scenes = out.with_name(f"{out.name} scenes")
    for item in sorted(path for path in drawn.iterdir() if path.suffix in (".png", ".mp4")):
        media.save(scenes / item.name, exchanged(media.load(item)), lossless=True)
    shutil.copy(drawn / "metadata.jsonl", scenes)
    family, device, transformer = family_of(pipe.transformer), torch.device("cpu"), pipe.transformer
    kept = out.with_name(f"{out.name} samples")
    samples = encoded(pipe, family, read_folder(scenes), call, False, kept, PartialState(cpu=True), True)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-4)
    for step in tqdm(range(steps), "exchanged colours"):
        draw, made = Draw("recoloured", step), Batch(dense=True)
        for place in range(batch):
            sample = samples[draw.rng.randrange(len(samples))]
            made.samples.append(sample)
            where = (place + draw.rng.random()) / batch
            made.levels.append(noise_level(where, sample.levels, "scheduler"))
            made.noise.append(draw.normal(sample.latents.shape))
        with torch.autocast("cpu", torch.bfloat16):
            output = transformer(**made.inputs(family, device, torch.float32), return_dict=False)
        predicted = family.predicted(output[0]).float() * (-1 if family.toward_data else 1)
        (predicted - made.velocity(device)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    part = out.with_name(f"{out.name} part")
    pipe.save_pretrained(part)
    return part.rename(out)
