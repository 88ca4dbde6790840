"""Presets for high resolution: their methods, arguments, and the page that lists them."""

from pathlib import Path

import pytest

from dit_accel.highres import METHODS, presets
from dit_accel.pipelines.families import families

PAGE = Path(__file__).parents[3] / "docs" / "highres.md"


def test_presets_are_of_methods_and_families():
    assert all(name == preset.name for name, preset in presets().items())
    assert {preset.method for preset in presets().values()} <= set(METHODS)
    assert {preset.family for preset in presets().values()} <= {family.name for family in families()}
    assert set(presets("wan")) == {"wan-swim", "wan-growing"}
    with pytest.raises(ValueError, match="no preset for high resolution is for the family 'sora'"):
        presets("sora")


def test_arguments():
    assert presets()["flux-clear"].arguments() == {
        "method": "clear",
        "strength": 0.7,
        "shift": 3.0,
        "num_inference_steps": 20,
        "guidance_scale": 3.5,
        "above": {"guidance_scale": 7.5},
    }
    assert "shift" not in presets()["flux-hiflow"].arguments()


def test_the_page_lists_them():
    page = PAGE.read_text()
    for preset in presets().values():
        assert f"| `{preset.name}` | {preset.describe()} | {preset.source} |" in page
