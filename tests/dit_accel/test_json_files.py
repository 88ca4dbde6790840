"""JSON files: what is written is strict JSON, and settings are compared as they would be written."""

import json
from pathlib import Path

import pytest

from dit_accel.json_files import check_same, from_json, read_json, to_json, write_json

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


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
def test_what_is_written_is_read(tmp_path, mark):
    write_json(tmp_path / "a.json", {**VALUE, "grün": "日本"})
    (tmp_path / "a.json").write_bytes(mark + (tmp_path / "a.json").read_bytes().replace(b"\n", b"\r\n"))
    assert read_json(tmp_path / "a.json") == {**WRITTEN, "grün": "日本"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("{", "Expecting"),
        ("{} {}", "Extra data"),
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' is there twice"),
        ('{"b": [{"a": 1, "a": 1}]}', "the key 'a' is there twice"),
        ("[NaN]", "NaN is no number of JSON"),
        ('{"a": -Infinity}', "-Infinity is no number of JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5_000, "4300 digits"),
        ("{'a': 1}", "Expecting property name"),
    ],
)
def test_other_than_strict_json_is_refused_by_name(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        read_json(tmp_path / "a.json", "a log")
    assert str(error.value).startswith(f"{tmp_path}/a.json cannot be read as a log: ")
    assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match=reason if text.strip() else "Expecting value"):
        from_json(text)
