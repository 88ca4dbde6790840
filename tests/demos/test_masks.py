"""The tab Masks: what it draws is what masks are, soon, and its Python draws it again."""

from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="needs dit-accel[demo]")
import numpy as np
from gradio_client.exceptions import AppError
from PIL import Image

from dit_accel import TokenLayout, patterns
from dit_accel.demos import mask_choices, mask_drawings, masks
from dit_accel.demos.settings import Caps
from dit_accel.planning.model_config import all_published

FLUX = (1, 64, 64, 512)  # 1024 x 1024 pixels
HUNYUAN = (33, 45, 80, 256)  # 129 frames of 1280 x 720


def path_of(part):
    return Path(part["path"] if isinstance(part, dict) else part)


def test_every_static_pattern_of_the_library_is_there():
    names = mask_choices.pattern_names()
    assert {"Clear", "Neighborhood", "Radial", "SlidingTile", "InwardWindow", "Dense"} <= set(names)
    assert "SparseVideoGen" not in names  # chosen by content


@pytest.mark.parametrize("name", mask_choices.pattern_names())
@pytest.mark.parametrize("grid", [(1, 64, 64), (9, 30, 40)], ids=["image", "video"])
def test_every_pattern_starts_with_parameters_that_it_reads_back(name, grid):
    try:
        pattern = mask_choices.starting_pattern(name, grid)
    except TypeError:
        pytest.fail(f"{name} has a parameter without a default: give it one in START")
    assert mask_choices.read(name, mask_choices.written(pattern), Caps()) == pattern


def test_figures_are_those_of_the_real_mask(client):
    grid = (1, 24, 24, 16)
    answer = client.predict("Clear", "radius: 5", *grid, "64x32", api_name="/mask")
    summary = answer[4]
    layout = TokenLayout(grid[:3], text_len=grid[3])
    assert summary["density"] == pytest.approx(patterns.Clear(5).density(layout))
    for row in summary["rows"]:
        mask = patterns.Clear(5).block_mask(layout, (64, 32), row["order"])
        assert row["block_density"] == pytest.approx(mask.block_density)


def test_python_draws_the_same_pictures(client, tmp_path, monkeypatch):
    answer = client.predict("Clear", "radius: 5", 1, 24, 24, 16, "64x32", api_name="/mask")
    monkeypatch.chdir(tmp_path)
    exec(compile(answer[6], "exported", "exec"), {})
    for part, name in zip(answer[:4], ("neighbourhood", *mask_drawings.ORDERS), strict=True):
        assert np.array_equal(np.asarray(Image.open(path_of(part))), np.asarray(Image.open(f"{name}.png")))


def test_every_published_model_gives_a_geometry():
    known = mask_choices.geometries()
    assert [name for name, _, _ in known.values()] == list(all_published())
    assert known["hunyuan-video  1280×720×129"][1:] == (HUNYUAN[:3], HUNYUAN[3])


@pytest.mark.parametrize(("noise", "radius"), [(1.0, 9), (0.8, 9), (0.79, 3), (0.0, 3)])
def test_a_pattern_by_noise_is_drawn_at_a_level(client, tmp_path, monkeypatch, noise, radius):
    levels = "levels: [[0.8, {pattern: Clear, radius: 9}], [0, {pattern: Clear, radius: 3}]]"
    answer = client.predict("ByNoise", levels, 1, 24, 24, 0, "64x32", noise, api_name="/mask")
    assert answer[4]["level"] == f"Clear radius: {radius}"
    layout = TokenLayout((1, 24, 24))
    assert answer[4]["density"] == pytest.approx(patterns.Clear(radius).density(layout))
    monkeypatch.chdir(tmp_path)
    exec(compile(answer[6], "exported", "exec"), {})
    for part, name in zip(answer[:4], ("neighbourhood", *mask_drawings.ORDERS), strict=True):
        assert np.array_equal(np.asarray(Image.open(path_of(part))), np.asarray(Image.open(f"{name}.png")))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("ByNoise", "levels: [[0, {pattern: Routed, top_k: 0.5}]]", 1, 8, 8, 0, "64x32"), "by content"),
        (("Clear", "radius: -1", 1, 8, 8, 0, "64x32"), "radius"),
        (("Clear", "radius: 3, unknown: 1", 1, 8, 8, 0, "64x32"), "unknown"),
        (("os.system", "", 1, 8, 8, 0, "64x32"), "Pattern must be one of|choices"),
        (("Clear", "radius: 3", 1, 4096, 4096, 0, "64x32"), "smaller grid"),
        (("Clear", "radius: 3", 1, 8, 8, -1, "64x32"), "Text"),
        (("Clear", "radius: 3, downsample: 2", 1, 8, 8, 0, "64x32"), "downsample"),
        (("Neighborhood", "window: [99, 99]", 1, 8, 8, 0, "64x32"), "window"),
    ],
    ids=["online", "value", "key", "name", "size", "text", "pooled", "window"],
)
def test_what_is_no_mask_is_told_in_words(client, given, words):
    with pytest.raises(AppError, match=words):
        client.predict(*given, api_name="/mask")


@pytest.mark.parametrize("way", ["drag", "keys", "number"])
def test_a_slider_redraws_the_mask(open_page, way):
    page = open_page("Masks")
    page.locator("#mask-summary dd").first.wait_for()
    before = page.locator("#mask-summary").inner_text()
    slider = page.locator("#mask-knob-0 input[type=range]")
    if way == "drag":
        box = slider.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
    elif way == "keys":
        slider.focus()
        page.keyboard.press("ArrowRight")
    else:
        page.locator("#mask-knob-0 input[type=number]").fill("8")
        page.keyboard.press("Enter")
    changed = "before => document.querySelector('#mask-summary').innerText !== before"
    page.wait_for_function(changed, arg=before)


def test_figures_that_come_late_leave_the_newer_ones(client, demo, monkeypatch):
    given = ("Clear", "radius: 5", 1, 24, 24, 16, "64x32")
    first = next(iter(mask_choices.geometries()))
    assert client.predict(first, *given, api_name="/speed")["density"] > 0
    predicted = masks.predicted

    def late(*args):
        for session in demo.studio.sessions._sessions.values():
            session.drawings += 1  # somebody moves a slider meanwhile
        return predicted(*args)

    monkeypatch.setattr(masks, "predicted", late)
    assert not client.predict(first, *given, api_name="/speed").get("density")


def test_a_mask_is_redrawn_in_the_browser(open_page):
    page = open_page("Masks")
    summary = page.locator("#mask-summary")
    summary.locator("dd").first.wait_for()
    before = summary.inner_text()
    field = page.locator("#parameters textarea, #parameters input").first
    field.fill("radius: 4")
    field.press("Enter")
    changed = "before => document.querySelector('#mask-summary').innerText !== before"
    page.wait_for_function(changed, arg=before)
    assert page.locator(".orders img").count() == 4
