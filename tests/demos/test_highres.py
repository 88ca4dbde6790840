"""The tab High resolution: pictures of both sizes, and nothing that it does not offer."""

import pytest

pytest.importorskip("gradio", reason="needs dit-accel[demo]")
from gradio_client.exceptions import AppError
from PIL import Image

PROMPT = "a red circle at the top left on a striped background"
GIVEN = ["tiny-flux", PROMPT, "swim", 2, 0.5, 2, 3.0, 1]


def changed(place, value):
    return [*GIVEN[:place], value, *GIVEN[place + 1 :]]


def test_both_sizes_and_the_command(client):
    pair, note, _, python, command = client.predict(*GIVEN, api_name="/highres")
    sizes = [Image.open(one["path"] if isinstance(one, dict) else one).size for one in pair]
    assert sizes == [(64, 64), (128, 128)]
    assert note.startswith("128 x 128 by swim:")
    assert "--highres=swim" in command
    assert "--size=128x128" in command
    compile(python, "python", "exec")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed(0, "tiny-wan"), "choices|bundled model of pictures"),
        (changed(2, "swimm"), "choices|Method must be one of"),
        (changed(3, 9), "maximum|Times the native sides must be"),
        (changed(4, 0), "minimum|Strength must be"),
        (changed(1, " "), "Write a prompt"),
        (changed(5, 1), "leaves none of 1 steps"),
    ],
)
def test_refused(client, given, message):
    with pytest.raises(AppError, match=message):
        client.predict(*given, api_name="/highres")


def test_defaults_of_a_model(client):
    prompt, steps, guidance, _ = client.predict("tiny-flux", api_name="/highres_model")
    assert prompt
    assert steps > 1
    assert guidance > 1


def test_presets_set_method_strength_and_steps(client):
    assert list(client.predict("flux-hiflow", api_name="/highres_preset")) == ["flow", 0.55, 30]
    with pytest.raises(AppError, match=r"choices|Preset must be one of"):
        client.predict("flux", api_name="/highres_preset")


def test_it_is_shown_in_the_browser(open_page):
    page = open_page("High resolution")
    page.locator("#enlarge").wait_for()
