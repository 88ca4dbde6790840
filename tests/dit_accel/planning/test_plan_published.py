"""Plans of published models: their sizes, their papers' figures, and every preset."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from dit_accel import Recipe, presets
from dit_accel.patterns import Clear, InwardWindow, Neighborhood, Radial, Skipping, SlidingTile
from dit_accel.pipelines.families import family_named
from dit_accel.planning.model_config import all_published, published
from dit_accel.planning.plan import plan


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("flux.1-dev", (1, 4096, 4096), (1, 256, 256)),
        ("qwen-image", (1, 928, 1664), (1, 58, 104)),
        ("sd3.5-large", (1, 1024, 1024), (1, 64, 64)),
        ("hunyuan-video", (129, 720, 1280), (33, 45, 80)),
        ("hunyuan-video-1.5", (121, 720, 1280), (31, 45, 80)),
        ("wan2.1-14b", (81, 720, 1280), (21, 45, 80)),
        ("wan2.1-1.3b", (81, 480, 832), (21, 30, 52)),
        ("wan2.2-5b", (121, 704, 1280), (31, 22, 40)),
    ],
)
def test_grids(name, size, grid):
    model_config = all_published()[name]
    assert model_config.grid(model_config.transformer(), size) == grid


@pytest.mark.parametrize("name", all_published())
def test_planned_geometry_is_what_the_family_reads_from_a_call(name):
    model = all_published()[name]
    transformer, grid = model.transformer(), (3 if model.video else 1, 4, 6)
    inputs = model.inputs(transformer, grid, lambda *shape: torch.zeros(shape))
    assert model.layout(grid) == model.description.layout(transformer, inputs, {})
    assert model.layout(grid).grid == grid


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("flux.1-dev", 11.9), ("flux.2-dev", 32.2), ("flux.2-klein-4b", 3.88), ("flux.2-klein-9b", 9.08),
        ("qwen-image", 20.4), ("chroma1-hd", 8.9),
        ("sd3-medium", 2.03), ("sd3.5-medium", 2.24), ("sd3.5-large", 8.06),
        ("hunyuan-video", 12.8), ("hunyuan-video-1.5", 8.3),
        ("ltx-video-2b", 1.92), ("ltx-video-13b", 13.0), ("ltx-2-19b", 18.9), ("mochi-1", 10.0),
        ("cogvideox-5b", 5.57), ("cogvideox-2b", 1.69), ("kandinsky-5-lite", 2.0), ("kandinsky-5-pro", 19.3),
        ("wan2.2-animate-14b", 17.3),
        ("wan2.1-14b", 14.3), ("wan2.1-1.3b", 1.42), ("wan2.2-5b", 5.0),
    ],
)  # fmt: skip
def test_models_have_the_parameters_they_are_known_for(name, billions):
    transformer = all_published()[name].transformer()
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
    ("pattern", "family", "size", "frames", "density", "digits"),
    [
        # methods-sparse.md and methods-guidance-highres.md of the project: figures of the papers
        (Clear(8), "flux", (1024, 1024), None, 0.243316, 6),
        (Clear(16), "flux", (1024, 1024), None, 0.332082, 6),
        (Clear(32), "flux", (1024, 1024), None, 0.590642, 6),
        (Radial(0.2, first_frame_sink=True), "wan", (1280, 768), 69, 0.28713, 5),
        (Radial(1.0, first_frame_sink=True), "wan", (1280, 768), 69, 0.43092, 5),
        (Radial(0.8, first_frame_sink=True), "wan", (1280, 768), 77, 0.35253, 5),
        (Radial(0.95), "hunyuan-video", (1280, 768), 117, 0.27785, 5),
        (InwardWindow((15, 26)), "wan", (1920, 1088), 81, 0.201348, 6),
        (SlidingTile((3, 3, 5), (6, 8, 8)), "wan", (1280, 768), 69, 0.25, 2),
        (Neighborhood((18, 24, 24), (16, 8, 8)), "wan", (1280, 768), 117, 0.09, 2),
    ],
    ids=lambda value: str(value).replace(" ", "") if isinstance(value, tuple | float) else "",
)
def test_densities(pattern, family, size, frames, density, digits):
    model_config = published(family)
    grid = model_config.grid(model_config.transformer(), (frames or 1, size[1], size[0]))
    assert round(pattern.density(model_config.layout(grid)), digits) == density


def test_a_density_through_a_whole_plan():
    answer = plan(Clear(8), family="flux", size=(1024, 1024), device="cuda")
    assert round(answer.density, 6) == 0.243316
    assert answer.tokens == 64 * 64 + 512
    assert (answer.heads, answer.head_dim, len(answer.flops.layers)) == (24, 128, 19 + 38)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "family", "frames", "blocks"),
    [
        (Radial(0.2, first_frame_sink=True), "wan", 69, 83_728),
        (Radial(0.95), "hunyuan-video", 117, 226_056),
    ],
    ids=["wan", "hunyuan-video"],
)
def test_numbers_of_visited_blocks(pattern, family, frames, blocks):
    recipe = Recipe(pattern, block_size=(128, 128), order="raster")
    answer = plan(recipe, family=family, size=(1280, 768), frames=frames)
    assert answer.mask.num_full + answer.mask.num_partial == blocks
    assert answer.block_density == pytest.approx(blocks / (-(-answer.tokens // 128)) ** 2)


BIG = """
import re
from dit_accel.planning.plan import plan

def peak():  # unlike ru_maxrss, of this program alone
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

before = peak()
answer = plan("flux-clear-r16", family="flux", size=(16384, 16384), device="cuda")
print(answer.block_density, answer.sampled is not None, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in KiB")
def test_a_picture_of_16384_pixels_is_planned_in_a_gigabyte():
    """Beyond what is imported. Its whole mask, built once, has a block density of 0.0027690899463867313."""
    shown = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, check=True).stdout
    density, sampled, kilobytes = shown.split()
    assert float(density) == pytest.approx(0.0027690899463867313, rel=0.01)
    assert sampled == "True"
    assert int(kilobytes) < 10**6


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in presets() if not n.startswith("tiny-")])
def test_every_preset_has_a_plan(name):
    """At sizes that take a second or two; those of the papers are above."""
    recipe = presets()[name]
    asked = {"size": (832, 480), "frames": 73}
    if not family_named(recipe.family).video:
        asked = {"size": (1024, 1024) if recipe.family == "sd3" else (1536, 1536)}
    answer = plan(recipe, family=recipe.family, **asked, device="cuda")
    (rows, columns), tokens = answer.block_size, answer.tokens
    blocks = -(-tokens // rows) * rows * -(-tokens // columns) * columns  # the last ones are cut short
    assert 0 < answer.density <= answer.block_density * blocks / tokens**2
    if isinstance(recipe.attention, Skipping):  # what it will compute, only a run tells
        assert answer.density == answer.block_density == answer.attention.ideal == 1
    else:
        assert answer.block_density < 1
        assert answer.attention.ideal > 1
    assert json.dumps(answer.to_dict())
