"""Contact sheets and their tables."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dit_accel.evals.reports import sheets
from dit_accel.pipelines import load, tiny


def test_results_are_kept_per_recipe(tmp_path, monkeypatch):
    def measured(pipe, model, recipe, count):
        settings = {"size": [64, 64], "frames": None, "steps": 2, "guidance": 1.0}
        score = {"run_density": 1.0, "colour": 0.5, "mean": 0.5, "n": count, "settings": settings}
        return score, np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(sheets, "measure", measured)
    sheets.main(["tiny-flux", "--out", str(tmp_path), "--recipe", "tiny-flux-clear", "-n", "3"])
    sheets.main(["tiny-flux", "--out", str(tmp_path), "--recipe", "dense", "-n", "4"])
    results = json.loads((tmp_path / "tiny-flux.json").read_text())
    assert [(name, row["n"]) for name, row in results.items()] == [("dense", 4), ("tiny-flux-clear", 3)]
    assert (
        "| tiny-flux-clear | 64 x 64 px | 3 | 1.000 | 0.500 | 0.500 |"
        in (tmp_path / "tiny-flux.md").read_text()
    )
    assert Image.open(tmp_path / "tiny-flux-dense.png").size == (8, 8)


def test_one_sample_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.INFO, "tiny-flux", replace(tiny.INFO["tiny-flux"], demo=(1, 192, 192), steps=2))
    row, sheet = sheets.measure(load("tiny-flux"), "tiny-flux", "tiny-flux-clear", 1)
    assert row["n"] == 1
    assert 0 < row["run_density"] < 1
    assert sheet.shape == (128, 128, 3)


def test_native_size():
    row, sheet = sheets.measure(load("tiny-flux"), "tiny-flux", "native", 2)
    assert row["settings"]["size"] == [64, 64]
    assert sheet.shape == (128, 256, 3)


@pytest.mark.parametrize(
    "arguments", [["tiny-flux", "--recipe", "wan-radial"], ["tiny-flux", "-n", "0"], ["flux"]]
)
def test_bad_arguments(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        sheets.main([*arguments, "--out", str(tmp_path)])
    assert error.value.code == 2
    assert not list(tmp_path.iterdir())
