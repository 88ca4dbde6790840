"""JSON files: what is written is strict JSON, and settings are compared as they would be written."""

import json
from pathlib import Path

import pytest

from dit_accel.records import check_same, to_json, write_json

VALUE = {"size": (64, 96), "folder": Path("a/b"), "psnr": float("inf"), "layers": {2, 0, 1}, "recipe": None}
WRITTEN = {"size": [64, 96], "folder": "a/b", "psnr": None, "layers": [0, 1, 2], "recipe": None}


def test_values_are_written_in_json_s_terms(tmp_path):
    write_json(tmp_path / "new" / "a.json", VALUE)
    text = (tmp_path / "new" / "a.json").read_text()
    assert json.loads(text) == WRITTEN
    assert text == to_json(VALUE) + "\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_the_same_settings_pass():
    check_same(WRITTEN, VALUE, "the run in a was made", "another folder")
    check_same({**WRITTEN, "schema": 1}, VALUE, "the run in a was made", "another folder")


@pytest.mark.parametrize("earlier", [{**WRITTEN, "size": [64, 64]}, {**WRITTEN, "size": None}, {}])
def test_another_setting_is_refused(earlier):
    message = f"the run in a was made with another `size`, {earlier.get('size')}, not [64, 96]; use the same "
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check_same(earlier, VALUE, "the run in a was made", "another folder")
    assert str(error.value) == message + "settings, or another folder"
