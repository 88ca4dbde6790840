"""The tab Generate, in a real browser and by its API: what it makes, and that its exports make it again."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_accel import media

pytest.importorskip("gradio", reason="needs dit-accel[demo]")
from dit_accel.demos.knobs import AS_GIVEN
from dit_accel.demos.runs import FPS

MADE_SMALL = {"Width": "32", "Height": "32", "Frames": "5", "Steps": "2"}


def exported(page, tab):
    """What the export area shows in one of its tabs."""
    area = page.locator(".export").first
    if not area.get_by_role("tab", name=tab).is_visible():
        area.get_by_text("Reproduce this").click()
    area.get_by_role("tab", name=tab).click()
    code = area.locator(".cm-content:visible")
    code.wait_for()
    return code.inner_text()


def run_command(text, folder):
    """Runs an exported command with this Python's `dit-accel`, in a new folder."""
    folder.mkdir()
    text = text.replace("dit-accel generate", f"{sys.executable} -m dit_accel generate")
    subprocess.run(["bash", "-e", "-c", text], cwd=folder, check=True, capture_output=True, timeout=900)
    return folder


@pytest.fixture(scope="module")
def compared(client, small):
    """What `/compare` answers."""
    return client.predict(*small, api_name="/compare")


def paths_of(answer):
    return [Path(part["path"] if isinstance(part, dict) else part) for part in answer]


def test_numbers_are_written_into_the_recipe(client):
    """Chosen beside a preset, which then is one no more, and beside dense attention."""
    text = client.predict("tiny-flux-clear", "int8", api_name="/numbers")
    assert "quantization: int8" in text
    assert "quantization" not in client.predict(text, AS_GIVEN, api_name="/numbers")
    assert "pattern: Dense" in client.predict("dense", "int8-int4", api_name="/numbers")
    assert client.predict("dense", AS_GIVEN, api_name="/numbers") == "dense"


def test_a_picture_in_the_browser_is_made_again_by_its_command(open_page, make_small, tmp_path):
    page = open_page()
    make_small(page)
    page.locator("#compare").click()
    page.locator("#figures dd").first.wait_for()
    assert page.locator("#pair img").count() == 2
    assert page.locator("#figures section").count() == 2
    text = page.locator("#figures").inner_text()
    for words in ("time", "per step", "speed-up of a step", "pairs computed", "PSNR to dense"):
        assert words in text
    src = page.locator("#pair img").evaluate_all("images => images.map(image => image.src)")
    (accelerated,) = {one for one in src if "accelerated.png" in one}
    shown = page.request.get(accelerated).body()
    run_command(exported(page, "Command line"), tmp_path / "run")
    again = media.load(tmp_path / "run" / "picture.png")
    (tmp_path / "shown.png").write_bytes(shown)
    assert np.array_equal(media.load(tmp_path / "shown.png"), again)


def test_python_makes_the_same_picture(compared, tmp_path, monkeypatch):
    pair, _, _, recipe, python, _ = compared
    assert "Clear" in recipe
    monkeypatch.chdir(tmp_path)
    exec(compile(python, "exported", "exec"), {})
    assert np.array_equal(media.load("picture.png"), media.load(paths_of(pair)[1]))


def test_figures_say_what_it_saved(compared):
    pair, _, figures, *_ = compared
    dense, fast = figures
    assert (dense["label"], fast["label"]) == ("dense", "accelerated")
    assert dense["density"] == 1
    assert 0 < fast["density"] < 1
    assert fast["speedup"] == pytest.approx(dense["step_seconds"] / fast["step_seconds"], rel=0.1)  # rounded
    from dit_accel.evals.metrics.fidelity import psnr

    pictures = [media.load(path) for path in paths_of(pair)]
    assert fast["psnr"] == pytest.approx(psnr(pictures[1], pictures[0]), abs=0.01)


def test_generate_alone_is_the_accelerated_picture(client, small, compared):
    single, _, figures, *_ = client.predict(*small, api_name="/generate")
    assert [row["label"] for row in figures] == ["accelerated"]
    assert paths_of([single])[0].read_bytes() == paths_of(compared[0])[1].read_bytes()


def test_videos_start_stop_and_seek_together(open_page, make_small, demo):
    page = open_page()
    page.get_by_label("Model").click()
    page.get_by_role("option", name="tiny-wan").click()
    page.locator("#players").wait_for()
    make_small(page, "attention: {pattern: Neighborhood, window: [2, 2, 2]}\n", **MADE_SMALL)
    page.locator("#compare").click()
    page.wait_for_function("document.querySelectorAll('#players video').length === 2")
    ready = "[...document.querySelectorAll('#players video')].every(video => video.readyState >= 2)"
    page.wait_for_function(ready)
    times = "[...document.querySelectorAll('#players video')].map(video => video.currentTime)"
    paused = "[...document.querySelectorAll('#players video')].map(video => video.paused)"
    page.wait_for_function(f"{paused}.every(one => !one)")  # they start by themselves, together
    page.locator("#players .play").click()
    page.wait_for_function(f"{paused}.every(one => one)")
    page.locator("#players .seek").evaluate(
        "bar => { bar.value = 0.5; bar.dispatchEvent(new Event('input')); }"
    )
    page.wait_for_function(f"{times}.every(one => one > 0)")
    first, second = page.evaluate(times)
    assert first == pytest.approx(second, abs=1 / FPS)
    page.locator("#players .play").click()
    page.wait_for_function(f"{paused}.every(one => !one)")


def test_a_video_is_made_again_by_its_command(client, held_out, tmp_path):
    recipe = "attention: {pattern: Neighborhood, window: [2, 2, 2]}\n"
    given = ("tiny-wan", held_out["tiny-wan"], recipe, 32, 32, 5, 2, 3.0, 2)
    _, videos, figures, *_, command = client.predict(*given, api_name="/compare")
    assert [row["label"] for row in figures] == ["dense", "accelerated"]
    folder = run_command(command, tmp_path / "run")
    assert np.array_equal(media.load(folder / "video.mp4"), media.load(videos[1]["path"]))


def test_cancel_stops_within_a_step_and_frees_the_worker(open_page, make_small, demo, small, client):
    page = open_page()
    make_small(page, Width="128", Height="128", Steps="100")
    page.locator("#compare").click()
    page.wait_for_function("document.body.innerText.match(/step \\d+ of 100|\\d+\\/200/)")
    page.locator("#cancel").click()
    assert demo.studio.worker._lock.acquire(timeout=300)
    demo.studio.worker._lock.release()
    assert page.locator("#figures dd").count() == 0
    assert client.predict(*small, api_name="/generate")[2]  # the next one is served


def test_two_visitors_at_once_and_the_second_sees_its_place(open_page, make_small):
    one, two = open_page(), open_page()
    make_small(one, Steps="100", Width="128", Height="128")
    make_small(two)
    one.locator("#compare").click()
    one.wait_for_function("document.body.innerText.match(/step \\d+ of 100|\\d+\\/200/)")
    two.locator("#compare").click()
    two.wait_for_function("document.body.innerText.match(/queue: \\d+\\/\\d+/)")
    one.locator("#cancel").click()
    two.locator("#figures dd").first.wait_for()
    assert two.locator("#pair img").count() == 2


def test_bad_input_is_told_before_it_waits_for_its_turn(open_page, make_small, demo):
    assert demo.studio.worker._lock.acquire(timeout=60)
    try:
        page = open_page()
        make_small(page, Width="100000")
        page.locator("#compare").click()
        page.get_by_text("Width must be a whole number").first.wait_for()
    finally:
        demo.studio.worker._lock.release()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"Width": "65"}, "multiple of"),
        ({"Width": "100000"}, "Width must be a whole number"),
        ({"Steps": "5000"}, "Steps must be a whole number"),
        ({"recipe": "attention: {pattern: Clear, radius: -3}"}, "radius"),
    ],
    ids=["size", "too-large", "too-many-steps", "recipe"],
)
def test_bad_input_is_told_in_words(open_page, make_small, fields, words):
    page = open_page()
    make_small(page, **fields)
    page.locator("#compare").click()
    page.get_by_text(re.compile(re.escape(words))).first.wait_for()
    assert page.locator("#figures dd").count() == 0
