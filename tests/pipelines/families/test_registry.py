"""Families register themselves: those of the folder, and a module from anywhere that is imported."""

import importlib
import json
import sys

import pytest

from dit_accel.pipelines import families, family_named, family_of
from dit_accel.pipelines.families import registry
from dit_accel.planning.model_config import all_published, published

MODULE = """
from dit_accel.pipelines.families import register
from dit_accel.pipelines.families.base import Family

@register
class Mine(Family):
    name = "{name}"
    transformer = "MineTransformer"
"""


@pytest.fixture
def drop(tmp_path, monkeypatch):
    """Imports a family's module written into a folder; what it registered is forgotten afterwards."""
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    monkeypatch.syspath_prepend(tmp_path)

    def write(stem: str, name: str):
        (tmp_path / f"{stem}.py").write_text(MODULE.format(name=name))
        monkeypatch.delitem(sys.modules, stem, raising=False)
        importlib.invalidate_caches()
        return importlib.import_module(stem)

    return write


def test_a_module_that_is_imported_registers_its_family(drop, tmp_path):
    before = families()
    module = drop("family_of_mine", "mine")
    assert families() == (*before, family_named("mine"))
    transformer = type("MineTransformer", (), {})()
    assert family_of(transformer) is family_named("mine")
    with pytest.raises(ValueError, match="no published model of the family 'mine' is known"):
        published("mine")
    importlib.reload(module)
    assert len(families()) == len(before) + 1


def test_published_models_stand_beside_the_module(drop, tmp_path):
    fields = {"name": "mine-1", "config": {}, "vae": [1, 8], "text_len": 3, "size": [1, 64, 96], "steps": 5}
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "mine.json").write_text(json.dumps([fields, {**fields, "name": "mine-2"}]))
    drop("family_of_mine", "mine")
    assert (published("mine").name, published("mine", "mine-2").size) == ("mine-1", (1, 64, 96))
    with pytest.raises(ValueError, match="its variants are mine-1, mine-2"):
        published("mine", "mine-3")


def test_a_name_is_of_one_family(drop):
    with pytest.raises(ValueError, match=r"two families are called 'wan': .*wan\.Wan and .*Mine; give one"):
        drop("family_of_mine", "wan")
    assert type(family_named("wan")).__name__ == "Wan"


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"no family is called 'sora'; the families are .*flux, "):
        family_named("sora")


def test_every_family_has_published_models_of_different_names():
    names = [fields["name"] for family in families() for fields in family.published()]
    assert {all_published()[name].family for name in names} == {family.name for family in families()}
    assert list(all_published()) == names
