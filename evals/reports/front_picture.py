"""Draws the README's picture: `python -m dit_accel.evals.reports.front_picture`, a part of `make readme`.

A row for dense attention and one for each recipe: on the left what one token attends to, then the same
prompts from the same seeds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dit_accel import accelerated, media
from dit_accel.generation import Request, execute, load
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Dense, StaticPattern
from dit_accel.planning.model_config import of_model
from dit_accel.recipe.recipe import resolve

from .examples import GALLERY
from .pattern_pictures import INK, KEY, NONE, QUERY, WHITE

PATH = Path("demos/assets/front.png")
MODEL, RECIPES, SEED = "tiny-flux", ("tiny-flux-clear",), 1
SIDE, GAP, LABEL = 208, 10, 24  # pixels


def keys(pattern: StaticPattern, layout: TokenLayout) -> Image.Image:
    """The keys of one query on the grid."""
    _, rows, columns = layout.grid
    row, column = rows * 2 // 5, columns * 2 // 5
    visual = pattern.token_mask(layout)[layout.visual_slice, layout.visual_slice]
    attended = visual[row * columns + column].reshape(rows, columns).numpy()
    pixels = np.where(attended[..., None], np.uint8(KEY), np.uint8(NONE))
    pixels[row, column] = QUERY
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def main() -> None:
    """Generates and draws."""
    pipe = load(MODEL, torch.float32, torch.device("cpu"))
    requests = [Request(prompt, seed=SEED).with_defaults(MODEL, "demo") for prompt in GALLERY]
    config = of_model(MODEL)
    layout = config.layout(config.grid(config.transformer(), config.size))
    rows = []
    for name in (None, *RECIPES):
        recipe = resolve(Dense() if name is None else name)
        with accelerated(pipe, recipe) as handle:
            pictures = [Image.fromarray(execute(pipe, request, None).frames[0]) for request in requests]
            label = "dense: every pair" if name is None else f"{name}: {handle.run_density:.0%} of the pairs"
            rows.append((label, [keys(recipe.attention, layout), *pictures]))
    width = (len(GALLERY) + 1) * (SIDE + GAP) + GAP
    height = len(rows) * (SIDE + LABEL + GAP) + GAP
    canvas = Image.new("RGB", (width, height), WHITE)
    pen = ImageDraw.Draw(canvas)
    for i, (label, pictures) in enumerate(rows):
        top = GAP + i * (SIDE + LABEL + GAP)
        text = f"{label}; on the left, what the red token attends to"
        pen.text((GAP, top), text, INK, ImageFont.load_default(14))
        for j, picture in enumerate(pictures):
            small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            canvas.paste(small, (GAP + j * (SIDE + GAP), top + LABEL))
    media.save(PATH, np.asarray(canvas)[None])


if __name__ == "__main__":
    main()
