"""What visitors and clients may ask for, and what is refused in words."""

import math

import pytest
import torch

from dit_accel.demos import inputs
from dit_accel.demos.settings import Caps, Settings

SETTINGS = Settings(torch.device("cpu"), torch.float32, models=("tiny-flux", "tiny-wan"))
CAPS = SETTINGS.caps


def request(name="tiny-flux", prompt="a", **given):
    return inputs.request(SETTINGS, name, prompt, **given)


def test_what_is_empty_is_the_models_own():
    asked = request(width=None, height=0, steps="", guidance=None)
    assert (asked.width, asked.height) == (64, 64)
    assert asked.steps == request(steps=asked.steps).steps
    assert asked.frames is None


@pytest.mark.parametrize(
    "name",
    [
        "tiny-sd3",
        "../tiny-flux",
        "/etc",
        "https://example.org/model",
        "black-forest-labs/FLUX.1-dev",
        "",
        None,
        3,
    ],
)
def test_only_listed_models_are_taken(name):
    with pytest.raises(ValueError, match="Model must be one of tiny-flux, tiny-wan"):
        inputs.model(SETTINGS, name)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"width": 10**9}, "Width must be a whole number from 16 to 1280"),
        ({"height": -64}, "Height"),
        ({"width": 64.5}, "Width"),
        ({"width": "64"}, "Width"),
        ({"steps": 10**6}, "Steps"),
        ({"steps": True}, "Steps"),
        ({"guidance": math.nan}, "Guidance"),
        ({"guidance": math.inf}, "Guidance"),
        ({"guidance": [4]}, "Guidance"),
        ({"seed": -1}, "Seed"),
        ({"seed": 2**64}, "Seed"),
        ({"seed": None}, "Seed"),
        ({"frames": 9}, "makes images"),
        ({"prompt": "a" * 2001}, "at most 2000 characters"),
        ({"prompt": "  "}, "Write a prompt"),
        ({"prompt": None}, "Prompt must be text"),
        ({"name": "tiny-wan", "frames": 145, "width": 1280, "height": 1280}, "more than this demo makes"),
        ({"name": "tiny-wan", "frames": 10**5}, "Frames"),
    ],
)
def test_what_is_out_of_bounds_is_named(given, words):
    with pytest.raises((ValueError, TypeError), match=words):
        request(**given)


def test_a_recipe_is_a_preset_or_text_or_dense():
    assert inputs.recipe("tiny-flux-clear", CAPS).name == "tiny-flux-clear"
    assert inputs.recipe("dense", CAPS) is None
    assert inputs.recipe("attention: {pattern: Clear, radius: 3}", CAPS).attention.radius == 3
    text = "attention: Dense\nguidance: {heads: [[0, 1]], strength: 0.5}"
    assert inputs.recipe(text, CAPS).guidance.strength == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "attention: Dense\nguidance: ../../etc/passwd",
        "attention: Dense\nguidance: heads.json",
        "attention: Dense\nadapter: /srv/adapter",
        "attention: Dense\nbackend: flex",
        "attention: {pattern: Calibrated, calibration: /etc/passwd}",
        "attention: {single: {pattern: Calibrated, calibration: x.safetensors}}",
        "attention: {pattern: Rectified, base: {pattern: Calibrated, calibration: x}}",
        "/etc/passwd",
        "recipe.yaml",
        "[1, 2]",
        "attention: !!python/object/apply:os.system ['true']",
        "a: &a [*a]",
        "attention: {pattern: Clear, radius: -3}",
        "attention: {pattern: os}",
        "x" * (CAPS.recipe + 1),
        None,
    ],
    ids=range(16),
)
def test_a_recipe_that_names_a_file_or_is_none_is_refused(text):
    with pytest.raises((ValueError, TypeError)) as caught:
        inputs.recipe(text, CAPS)
    assert len(str(caught.value)) < 2000


def test_caps_are_the_owners():
    small = Settings(torch.device("cpu"), torch.float32, caps=Caps(side=64))
    with pytest.raises(ValueError, match="from 16 to 64"):
        inputs.request(small, "tiny-flux", "a", width=128)
