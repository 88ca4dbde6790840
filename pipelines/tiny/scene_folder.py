"""Folders of drawn scenes with captions, as `dit-accel distill --data` takes them."""

from __future__ import annotations

import json
from pathlib import Path

from dit_accel import media
from dit_accel.files import write_text
from dit_accel.training_loop import Draw

from .captions import caption
from .models import Size, spec
from .scenes import render, sample


def write_scenes(name: str, folder: Path, count: int, size: Size | None = None, seed: int = 0) -> Path:
    """Write scenes that a bundled model may be trained on: PNG, or videos as lossless MP4, and captions.

    Args:
        name: of a bundled model.
        folder: to write, with `metadata.jsonl`.
        count: how many.
        size: frames, height, width in pixels; None: the model's demo size.
        seed: of what is drawn.
    """
    frames, height, width = size or spec(name).demo
    rng = Draw(seed, "scenes", name).rng
    lines = []
    for number in range(count):
        scene = sample(rng, "train", frames > 1)
        file = f"{number:05d}.{'mp4' if frames > 1 else 'png'}"
        drawn = media.to_uint8(render(scene, height, width, frames))
        media.save(folder / file, drawn, lossless=True)
        lines.append(json.dumps({"file_name": file, "text": caption(scene, rng)}))
    write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")
    return folder
