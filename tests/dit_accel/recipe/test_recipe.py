import dataclasses
import re

import pytest

from dit_accel.patterns import Clear, Dense, Neighborhood, Radial, SlidingTile
from dit_accel.pipelines import families
from dit_accel.recipe.recipe import Recipe, presets, resolve

RECIPES = {
    "one-pattern": Recipe(Clear(radius=8)),
    "tuples": Recipe(
        SlidingTile(window=(3, 3, 5), tile=(6, 8, 8)), dense_layers=2, dense_steps=0.25, backend="gather"
    ),
    "selectors": Recipe(
        {
            "double": Radial(decay_factor=0.2),
            "single.0-3/heads.0-1": Dense(),
            "-1": Neighborhood((3, 5), stride=(1, 5)),
        },
        dense_layers={0, -1},
        dense_steps=[0, 1, -1],
        block_size=(64, 32),
        order="raster",
        family="flux",
        name="mine",
        source="nowhere",
    ),
}
each = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@each
def test_yaml_round_trip(recipe):
    back = Recipe.from_yaml(recipe.to_yaml())
    assert back == recipe
    assert (back.name, back.source, back.tag, hash(back)) == (
        recipe.name,
        recipe.source,
        recipe.tag,
        hash(recipe),
    )
    assert list(back.attention) == list(recipe.attention) if isinstance(recipe.attention, dict) else True


@each
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_files(recipe, suffix, tmp_path):
    recipe.save(tmp_path / f"r{suffix}")
    assert Recipe.load(tmp_path / f"r{suffix}") == recipe
    assert resolve(tmp_path / f"r{suffix}") == recipe
    assert resolve(str(tmp_path / f"r{suffix}")) == recipe


@each
def test_tag_is_safe_and_stable(recipe):
    assert re.fullmatch(r"[A-Za-z0-9.+-]{1,60}", recipe.tag)
    assert dataclasses.replace(recipe).tag == recipe.tag
    assert dataclasses.replace(recipe, dense_steps=7).tag != recipe.tag


@pytest.mark.parametrize("name", ["", "named"])
def test_the_order_of_selectors_matters(name):
    """Later ones override earlier ones."""
    a, b = (Recipe(attention, name=name) for attention in (
        {"all": Clear(8), "1": Clear(2)}, {"1": Clear(2), "all": Clear(8)}
    ))  # fmt: skip
    assert a != b
    assert a.tag != b.tag
    assert len({a, b, Recipe({"all": Clear(8), "1": Clear(2)}, name=name)}) == 2


def test_tag_and_repr():
    recipe = Recipe(Neighborhood((5, 9, 9)), dense_steps=2)
    assert recipe.tag.startswith("neighborhood-5x9x9-")
    assert repr(recipe) == f"Recipe(attention={Neighborhood((5, 9, 9))!r}, dense_steps=2)"
    assert eval(repr(recipe)) == recipe


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attention": "radial"}, "`attention` must be a pattern"),
        ({"attention": {}}, "`attention` must be a pattern"),
        ({"attention": {"all": 3}}, "`attention` must be a pattern"),
        ({"dense_layers": -2}, "for the last n use"),
        ({"dense_layers": 0.5}, "`dense_layers` must be an int"),
        ({"dense_layers": True}, "`dense_layers` must be an int"),
        ({"dense_steps": 1.5}, "`dense_steps` must be an int"),
        ({"dense_steps": "all"}, "`dense_steps` must be an int"),
        ({"dense_steps": {0.5}}, "`dense_steps` must be an int"),
        ({"backend": None}, "`backend` must be text"),
        ({"attention": {1: Dense()}}, "layer selectors of `attention` must be text"),
        ({"tail": {1: "pooled"}}, "layer selectors of `tail` must be text"),
        ({"tail": {}}, "`tail` must be 'pooled', None or a mapping"),
        ({"order": "spiral"}, "`order` must be one of 'auto', 'raster', 'tile', 'hilbert', got 'spiral'"),
        ({"block_size": (100, 64)}, "`block_size` must be"),
    ],
)
def test_bad_values(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Recipe(**{"attention": Dense(), **kwargs})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "must be YAML or JSON"),
        ("3", "must be a mapping with the key `attention`"),
        ("dense_steps: 3", "must be a mapping with the key `attention`"),
        ("{attention: Dense, sparsity: 0.5}", "unknown recipe key 'sparsity'; the keys are attention"),
        ("attention: {pattern: Banana}", "unknown pattern 'Banana'; the patterns are"),
        ("attention: {pattern: Clear, radius: 3, colour: red}", "pattern Clear: .*colour"),
        ("attention: {pattern: Clear, radius: -3}", "`radius` must be a positive number, got -3"),
        ("attention: {double: {radius: 3}}", "a pattern must be a mapping with the key `pattern`"),
    ],
)
def test_bad_files(text, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Recipe.load(tmp_path / "bad.yaml")
    assert str(tmp_path / "bad.yaml") in str(error.value)


def test_presets():
    assert {"flux-clear-r8", "wan-radial", "wan-sta", "tiny-flux-clear", "tiny-wan-neighborhood"} <= set(
        presets()
    )
    assert set().union(*(presets(family.name) for family in families())) == set(presets())
    assert presets("nobody") == {}
    for name, recipe in presets().items():
        assert recipe.name == name
        assert recipe.source
        assert recipe.tag.startswith(name)
    radial = presets()["wan-radial"]
    assert radial.attention == Radial(decay_factor=0.2, first_frame_sink=True)
    assert [radial.is_dense_step(i, 50) for i in (11, 12)] == [True, False]
    assert radial.dense_layer_indices(40) == {0}


def test_resolve():
    assert resolve("wan-sta") is presets()["wan-sta"]
    assert resolve(Clear(3)) == Recipe(Clear(3))
    with pytest.raises(ValueError, match=r"'nope' is neither a preset nor a recipe file.*flux-clear-r16"):
        resolve("nope")
    with pytest.raises(FileNotFoundError, match=r"no recipe file at nope\.yaml"):
        resolve("nope.yaml")
    with pytest.raises(TypeError, match="expected a Recipe"):
        resolve(3)
    with pytest.raises(ValueError, match="must end in"):
        Recipe(Dense()).save("recipe.txt")
