"""Recipe files: text in every shape, what they name, and values that are copied plain."""

import json

import numpy as np
import pytest

from dit_accel.patterns import Clear, Dense
from dit_accel.recipe import files
from dit_accel.recipe.recipe import Recipe

RECIPE = Recipe(Clear(3), source="Grün, 日本", dense_layers=[0, -1])


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_text_is_read_however_it_is_saved(tmp_path, mark, end, suffix):
    path = tmp_path / f"a{suffix}"
    RECIPE.save(path)
    path.write_bytes(mark + path.read_bytes().replace(b"\n", end))
    found = Recipe.load(path)
    assert (found, found.source) == (RECIPE, "Grün, 日本")


@pytest.mark.parametrize("suffix", files.SUFFIXES)
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_refused_by_name(tmp_path, suffix, encoding):
    path = tmp_path / f"a{suffix}"
    path.write_bytes("attention: {pattern: Clear, radius: 3}\nsource: Grün".encode(encoding))
    with pytest.raises(ValueError, match="is not UTF-8") as error:
        Recipe.load(path)
    assert str(path) in str(error.value)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    from dit_accel.guidance import HeadPerturbation

    path = tmp_path / "a.yaml"
    RECIPE.save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a `strength` that is a function"):
        Recipe(Dense(), guidance=HeadPerturbation([0], strength=lambda t: t)).save(path)
    assert [one.name for one in tmp_path.iterdir()] == ["a.yaml"]
    assert path.read_bytes() == before


def test_large_files_are_refused_unread(tmp_path):
    path = tmp_path / "a.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"a\.yaml is too large for a recipe: 1099511627776 bytes"):
        Recipe.load(path)
    (tmp_path / "b.yaml").write_text("attention: Dense\nguidance: a.yaml")
    with pytest.raises(ValueError, match=r"a\.yaml is too large"):
        Recipe.load(tmp_path / "b.yaml")


@pytest.mark.parametrize("name", ["/dev/zero", "none.json", "."])
def test_guidance_that_is_no_file_is_named(tmp_path, name):
    (tmp_path / "a.yaml").write_text(f"attention: Dense\nguidance: {name}")
    with pytest.raises(ValueError, match="there is no file") as error:
        Recipe.load(tmp_path / "a.yaml")
    assert name in str(error.value)
    assert "a.yaml" in str(error.value)


def test_plain_data_is_a_copy():
    given = {"a": (1, [2.5, None]), 3: {"b": np.int64(4), "c": np.float32(0.5)}, "d": True}
    copy = files.plain_data(given)
    assert copy == {"a": [1, [2.5, None]], "3": {"b": 4, "c": 0.5}, "d": True}
    assert json.loads(json.dumps(copy)) == copy


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({1.5: 1}, TypeError),
        ({None: 1}, TypeError),
        ({True: 1}, TypeError),
        ({"a": {1, 2}}, TypeError),
        ({"a": b"b"}, TypeError),
        ({"a": object()}, TypeError),
        ({"a": np.zeros(3)}, TypeError),
        ({"a": float("nan")}, ValueError),
        ({"a": 2**64}, ValueError),
        ({"a": -(10**5000)}, ValueError),
    ],
)
def test_what_is_not_plain_is_refused(data, error):
    with pytest.raises(error, match="recipe"):
        files.plain_data(data)


@pytest.mark.parametrize("text", ["attention: Dense", '{"attention": "Dense"}'])
def test_the_longest_and_deepest_are_read(text):
    padded = text + " " * (files.LONGEST - len(text))
    assert files.parse(padded) == {"attention": "Dense"}
    with pytest.raises(ValueError, match="at most 400000 characters"):
        files.parse(padded + " ")
    deep = "[" * files.DEEPEST + "]" * files.DEEPEST
    assert json.dumps(files.parse(deep)) == deep
    with pytest.raises(ValueError, match="nested more than 12 deep"):
        files.parse(f"[{deep}]")


def test_perturbations_of_every_head_fit(tmp_path):
    """Of 60 layers of 48 heads, each with a strength of its own."""
    heads = [[layer, head, 0.123456789012345] for layer in range(60) for head in range(48)]
    recipe = Recipe.from_dict({"attention": "Dense", "guidance": {"heads": heads}})
    for suffix in (".yaml", ".json"):
        recipe.save(tmp_path / f"a{suffix}")
        assert Recipe.load(tmp_path / f"a{suffix}") == recipe
