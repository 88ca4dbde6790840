"""The pictures of docs/patterns.md."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_accel import patterns
from dit_accel.evals.reports import pattern_pictures

ROOT = Path(__file__).parents[3]
EXAMPLES = pattern_pictures.EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_grid_shows_the_keys_of_the_query(name):
    example = EXAMPLES[name]
    pixels = np.asarray(pattern_pictures.keys_panel(example)).reshape(-1, 3)
    counted = {
        colour: int((pixels == colour).all(1).sum())
        for colour in (pattern_pictures.KEY, pattern_pictures.QUERY)
    }
    cell = counted[pattern_pictures.QUERY]
    f, h, w = example.query
    layout = example.layout
    token = layout.visual_slice.start + (f * layout.grid[1] + h) * layout.grid[2] + w
    keys = example.keys()[layout.visual_slice]
    if isinstance(example.pattern, patterns.StaticPattern):
        assert torch.equal(keys, example.pattern.token_mask(layout)[token][layout.visual_slice])
    assert keys[(f * layout.grid[1] + h) * layout.grid[2] + w]
    assert counted[pattern_pictures.KEY] == cell * (int(keys.sum()) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_pictures_are_those_of_today(name):
    """But for the edges of letters, which another version of the font may draw otherwise."""
    drawn = pattern_pictures.draw(EXAMPLES[name])
    kept = Image.open(ROOT / pattern_pictures.FOLDER / f"{name}.png").convert("RGB")
    assert kept.size == drawn.size
    skipped = pattern_pictures.GAP + pattern_pictures.TITLE
    difference = np.abs(np.asarray(drawn, int) - np.asarray(kept, int))[skipped:]
    assert difference.mean() < 3, "draw them anew by `python -m dit_accel.evals.reports.pattern_pictures`"


def test_every_pattern_has_its_section():
    """One that is drawn has its picture there."""
    text = (ROOT / "docs/patterns.md").read_text()
    known = (getattr(patterns, name) for name in patterns.__all__)
    for pattern in filter(dataclasses.is_dataclass, known):
        assert f"\n### {pattern.__name__}\n" in text
    for name in EXAMPLES:
        assert f"](patterns/{name}.png)" in text
