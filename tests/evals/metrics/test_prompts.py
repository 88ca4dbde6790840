"""Prompts by file name: the forms of the file, and that both sides have to be complete."""

import json

import pytest

from dit_accel.evals.metrics.prompts import of_files, read


@pytest.fixture
def write(tmp_path):
    def write(value, name="prompts.json"):
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return write


def test_an_object_goes_by_names(write):
    prompts = {"b/1.png": "a cat", "a.mp4": "a dog"}
    assert of_files(write(prompts), ["a.mp4", "b/1.png"]) == prompts


def test_lines_go_by_the_names_of_a_sweep_or_of_vbench(write):
    path = write("a cat\n\n a well-known dog \n", "prompts.txt")
    assert of_files(path, ["000.png", "001.png"]) == {"000.png": "a cat", "001.png": "a well-known dog"}
    assert of_files(path, ["deep/1.mp4", "0.mp4"]) == {"deep/1.mp4": "a well-known dog", "0.mp4": "a cat"}
    videos = ["a cat-0.mp4", "a cat-1.mp4", "a well-known dog-0.mp4"]
    assert list(of_files(path, videos).values()) == ["a cat", "a cat", "a well-known dog"]


@pytest.mark.parametrize("schema", ["dit-accel/eval/1", "dit-accel/sweep-runs/1"])
def test_a_sweep_knows_its_prompts(write, schema):
    """As `Sweep.settings` has them, in `sweep.json` and in `runs.json`."""
    path = write({"schema": schema, "settings": {"prompts": ["a cat", "a dog", "a cat"]}})
    names = ["000.png", "001.png", "002.png"]
    assert list(of_files(path, names).values()) == ["a cat", "a dog", "a cat"]


@pytest.mark.parametrize(
    ("value", "name", "message"),
    [
        ({"a.png": "a cat"}, "p.json", r"by .*p\.json, 1 files have no prompt: 000\.png$"),
        ({"000.png": "a", "x.png": "b"}, "p.json", r"1 names have no file: x\.png$"),
        ({"000.png": " "}, "p.json", r"the prompt of 000\.png must be a text, got ' '"),
        ({"000.png": 3}, "p.json", r"the prompt of 000\.png must be a text, got 3"),
        ('{"000.png": "a", "000.png": "b"}', "p.json", r"the key '000\.png' is there twice"),
        ("{", "p.json", r"p\.json cannot be read as prompts"),
        (["a"], "p.json", "must be an object from file names to prompts, got "),
        ({"schema": "dit-accel/eval/1", "settings": {}}, "p.json", "is no sweep's"),
        ("a cat\na dog", "p.txt", "1 prompts have no file: 'a dog'"),
        ("\n \n", "p.txt", r"`--prompts`: .*p\.txt is empty"),
    ],
)
def test_what_does_not_fit_is_refused(write, value, name, message):
    with pytest.raises(ValueError, match=message):
        of_files(write(value, name), ["000.png"])


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, mark):
    (tmp_path / "p.txt").write_bytes(mark + "ein grüner Kreis\r\na dog".encode())
    (tmp_path / "p.json").write_bytes(mark + b'{"000.png": "a cat"}')
    assert read(tmp_path / "p.txt") == ["ein grüner Kreis", "a dog"]
    assert of_files(tmp_path / "p.json", ["000.png"]) == {"000.png": "a cat"}


@pytest.mark.parametrize("name", ["p.txt", "p.json"])
@pytest.mark.parametrize("content", ["a cät".encode("latin-1"), "a cat".encode("utf-16"), b"a\0cat"])
def test_other_encodings_are_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not"):
        of_files(tmp_path / name, ["000.png"])


def test_long_lists_are_cut(write):
    with pytest.raises(ValueError, match=r"7 files have no prompt: 1, 2, 3, 4, 5 and 2 more$"):
        of_files(write({}), list("7654321"))


def test_no_such_file(tmp_path):
    for name in ("none.json", "none.txt"):
        with pytest.raises(ValueError, match=name):
            of_files(tmp_path / name, ["a.png"])
