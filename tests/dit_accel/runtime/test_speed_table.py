"""Speed tables: files are checked, the user's of this machine comes first, others are told apart."""

from __future__ import annotations

import dataclasses
import json

import pytest

import dit_accel
from dit_accel import Recipe
from dit_accel.patterns import Clear
from dit_accel.planning.plan import plan
from dit_accel.runtime.measured_speed import measured_speed
from dit_accel.runtime.speed_table import (
    SHIPPED,
    AttentionCase,
    BreakEven,
    SpeedTable,
    calibrated_path,
    speed_tables,
    this_machine,
)

CASES = (AttentionCase("float32", 64, 4, 1024, 0.25, 0.5),)
LENGTHS = (BreakEven("float32", 64, 0.9, 10.0),)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def calibrated(machine=None, **changes) -> SpeedTable:
    """Writes a table of this machine where `dit-accel bench --calibrate` does."""
    here = this_machine("cpu")
    table = SpeedTable(machine or here, CASES, LENGTHS)
    table.write(calibrated_path(here))
    return table


def test_what_is_written_is_read(tmp_path):
    table = SpeedTable(this_machine("cpu"), CASES, LENGTHS)
    table.write(tmp_path / "table.json")
    assert SpeedTable.read(tmp_path / "table.json") == table


def test_the_table_of_this_machine_comes_before_that_of_the_library():
    shipped = SpeedTable.read(SHIPPED / "cpu.json")
    assert speed_tables("cpu") == [shipped]
    table = calibrated()
    assert speed_tables("cpu") == [dataclasses.replace(table, calibrated=True), shipped]
    assert speed_tables("cuda") == []


def test_what_is_measured_anew_is_read_anew():
    calibrated()
    assert measured_speed("cpu", "float32", 64).efficiency == (0.5, 0.5, 0.5)
    here = this_machine("cpu")
    SpeedTable(here, (dataclasses.replace(CASES[0], efficiency=0.75),)).write(calibrated_path(here))
    assert measured_speed("cpu", "float32", 64).efficiency == (0.75, 0.75, 0.75)


def test_a_dtype_that_was_not_calibrated_is_of_the_library():
    calibrated()
    assert measured_speed("cpu", "bfloat16", 64).shortest > 1024


def test_a_relative_cache_folder_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert calibrated_path(this_machine("cpu")).is_relative_to(tmp_path / ".cache")


@pytest.mark.parametrize(
    ("change", "like"),
    [
        ({}, True),
        ({"torch": "9.9"}, True),
        ({"instructions": ""}, True),  # not recorded
        ({"name": "another"}, False),
        ({"threads": 999}, False),
        ({"instructions": "SVE"}, False),
    ],
    ids=["same", "torch", "not-recorded", "name", "threads", "instructions"],
)
def test_machines_are_alike(change, like):
    here = dataclasses.replace(this_machine("cpu"), instructions="AMX")
    assert here.is_like(dataclasses.replace(here, **change)) == like


class TestSaysWhere:
    """In `summary`, `plan` and the reason of a layer that stays dense."""

    def said(self, flux) -> tuple[str, str, str]:
        recipe = Recipe(Clear(1000), min_tokens="auto")  # denser than what was measured
        with dit_accel.accelerated(flux.pipe, recipe):
            flux.run(flux.pipe)
            summary = dit_accel.summary(flux.pipe)
        notes = plan(Clear(4), model="tiny-flux", size=(128, 128)).notes
        return str(summary), "\n".join(notes), summary.rows[0]["note"]

    def test_on_this_machine(self, flux):
        calibrated()
        summary, notes, reason = self.said(flux)
        here = f"10 at density 0.9, as measured on this machine ({this_machine('cpu')})"
        assert here in summary
        assert here in notes
        assert "another machine" not in summary + notes + reason

    def test_on_another(self, flux):
        calibrated(dataclasses.replace(this_machine("cpu"), name="Abacus", threads=3))
        summary, notes, reason = self.said(flux)
        for text in (summary, notes):
            assert "on another machine (Abacus, 3 threads" in text
            assert f"not like this one ({this_machine('cpu')})" in text
            assert "`dit-accel bench --calibrate` measures this one" in text
        assert reason.endswith("as measured on another machine")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("schema"),
        lambda data: data.pop("machine"),
        lambda data: data["machine"].update(threads=-1),
        lambda data: data["machine"].update(name=3),
        lambda data: data["machine"].update(more=1),
        lambda data: data["attention"].append(7),
        lambda data: data["attention"][0].update(efficiency=0),
        lambda data: data["attention"][0].update(efficiency="fast"),
        lambda data: data["attention"][0].update(tokens=True),
        lambda data: data["attention"][0].update(block_density=1.5),
        lambda data: data["attention"][0].update(efficiency=10**400),
        lambda data: data["break_even"][0].pop("tokens"),
        lambda data: data.update(break_even=3),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(damage):
    calibrated()
    path = calibrated_path(this_machine("cpu"))
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"not a speed table: .*delete it, or measure anew") as raised:
        measured_speed("cpu", "float32", 64)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": NaN}'])
def test_what_is_no_table_at_all(content):
    calibrated()
    path = calibrated_path(this_machine("cpu"))
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a speed table"):
        speed_tables("cpu")
