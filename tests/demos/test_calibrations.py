"""Calibrations on the page: those in the folder of results, drawn as they are; nothing else is opened."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="needs dit-accel[demo]")
import calibrations as made
import numpy as np
from PIL import Image

from dit_accel.calibration.picture import draw_choices
from dit_accel.demos import calibrations
from dit_accel.demos.app import served


@pytest.fixture
def folder(tmp_path) -> Path:
    made.drawn((3, 4, 6)).save(tmp_path / "wan" / "mixed.safetensors")
    (tmp_path / "weights.safetensors").write_bytes(b"of something else")
    return tmp_path


def test_those_of_the_results(settings, folder):
    assert list(calibrations.calibrations(replace(settings, results=folder))) == ["wan/mixed.safetensors"]
    assert calibrations.calibrations(replace(settings, results=folder / "none")) == {}


def test_drawn_as_they_are(settings, folder, client_of):
    with served(replace(settings, results=folder), quiet=True) as (address, _):
        picture, said = client_of(address).predict("wan/mixed.safetensors", api_name="/calibration")
        path = Path(picture["path"] if isinstance(picture, dict) else picture)
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(draw_choices(made.drawn((3, 4, 6)))))
        assert "density 0.4. Of 16 choices: " in said


def test_no_other_file_is_opened(settings, folder):
    studio = SimpleNamespace(settings=replace(settings, results=folder))
    for label in ("weights.safetensors", "../secret", None):
        with pytest.raises(ValueError, match="Choose one of the listed calibrations"):
            calibrations.draw(studio, label, None)
