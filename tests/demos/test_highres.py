"""The tab High resolution: pictures and videos of both sizes, and nothing that it does not offer."""

import pytest

pytest.importorskip("gradio", reason="needs dit-accel[demo]")
import numpy as np
from gradio_client.exceptions import AppError
from PIL import Image

from dit_accel import media

PROMPT = "a fox at the top left on a blue striped background"
GIVEN = ["tiny-flux", PROMPT, "swim", 2, 0.5, None, 2, 3.0, 1]
VIDEO = ["tiny-wan", PROMPT, "growing", 2, 0.5, 5, 2, 3.0, 1]


def changed(place, value, given=GIVEN):
    return [*given[:place], value, *given[place + 1 :]]


def test_both_sizes_and_the_command(client):
    pair, videos, note, _, python, command = client.predict(*GIVEN, api_name="/highres")
    sizes = [Image.open(one["path"] if isinstance(one, dict) else one).size for one in pair]
    assert sizes == [(64, 64), (128, 128)]
    assert not videos
    assert "**swim**: 128 × 128, " in note
    assert "--highres=swim" in command
    assert "--size=128x128" in command
    compile(python, "python", "exec")


def test_a_video_is_made_again_by_its_python(client, tmp_path, monkeypatch):
    pair, videos, note, _, python, command = client.predict(*VIDEO, api_name="/highres")
    assert not pair
    native, large = (media.load(one["path"]) for one in videos)
    assert (native.shape, large.shape) == ((5, 64, 64, 3), (5, 128, 128, 3))
    assert "**growing**: 128 × 128, 5 frames, " in note
    assert "--frames=5" in command
    monkeypatch.chdir(tmp_path)
    exec(compile(python, "exported", "exec"), {})
    assert np.array_equal(media.load("video.mp4"), large)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed(0, "tiny-sd3"), "choices|Model must be one of"),
        (changed(2, "swimm"), "choices|Method must be one of"),
        (changed(2, "windows"), "choices|Method must be one of"),
        (changed(3, 9), "maximum|Times the native sides must be"),
        (changed(3, 1), "minimum|Times the native sides must be"),
        (changed(4, 0), "minimum|Strength must be"),
        (changed(1, " "), "Write a prompt"),
        (changed(5, 5), "makes images; leave Frames empty"),
        (changed(6, 1), "leaves none of 1 steps"),
        (changed(3, 1, VIDEO), "minimum|This is the native size"),
        (changed(5, 1000, VIDEO), "Frames must be a whole number"),
        (changed(5, 6, VIDEO), "multiple of 4 plus 1"),
    ],
)
def test_refused(client, given, message):
    with pytest.raises(AppError, match=message):
        client.predict(*given, api_name="/highres")


def test_defaults_of_a_model(client):
    answer = client.predict("tiny-wan", api_name="/highres_model")
    prompt, preset, method, times, frames, steps, guidance, *_ = answer
    assert prompt
    assert ["none", "none"] in preset["choices"]
    assert ["windows", "windows"] in method["choices"]
    assert times["minimum"] == 1
    assert frames["value"] == 17
    assert steps > 1
    assert guidance > 1


def test_presets_set_method_strength_and_steps(client):
    client.predict("tiny-flux", api_name="/highres_model")  # of which Gradio remembers the choices
    assert list(client.predict("flux-hiflow", api_name="/highres_preset")) == ["flow", 0.55, 30]
    with pytest.raises(AppError, match=r"choices|Preset must be one of"):
        client.predict("flux", api_name="/highres_preset")


def test_videos_are_shown_in_the_browser(open_page):
    page = open_page("High resolution")
    page.get_by_role("tabpanel").get_by_label("Model").locator("visible=true").click()
    page.get_by_role("option", name="tiny-wan").click()
    page.locator("#enlarged-players").wait_for()
    assert page.locator("#enlarged").is_hidden()
