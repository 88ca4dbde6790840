"""`dit-accel bench`: its table and JSON, and a calibration that plans then predict from."""

from __future__ import annotations

import json

import pytest
import torch

from dit_accel.evals.benchmarks import calibrate
from dit_accel.evals.benchmarks.attention import Case
from dit_accel.kernels import can_run
from dit_accel.patterns import Clear
from dit_accel.runtime.measured_speed import measured_speed
from dit_accel.runtime.speed_table import SpeedTable, calibrated_path, this_machine

ASKED = {"device": "cpu", "dtype": torch.float32, "head_dim": 64, "block_size": (64, 16)}
SMALL = (Case(0.25, Clear(6), (1, 16, 16)), Case(0.25, Clear(12), (1, 32, 32)))


@pytest.fixture
def bench(cli_of, monkeypatch, tmp_path):
    """The command with few, small cases, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "CASES", SMALL)
    monkeypatch.setattr(calibrate.calibrate, "__kwdefaults__", {
        "cases": SMALL, "sides": (4, 8), "repeats": 1, "repeats_short": 1,
    })  # fmt: skip
    return cli_of("bench")


def test_help_has_an_example(bench):
    assert "Example: dit-accel bench --calibrate" in " ".join(bench.run("--help").stdout.split())


def test_the_table_and_the_json(bench, tmp_path):
    answer = json.loads(bench.run("--json").stdout)
    assert answer["schema"] == "dit-accel/bench/1"
    assert answer["environment"]["cpu"]["name"] == this_machine("cpu").name
    assert [(row["tokens"], row["dtype"]) for row in answer["attention"]] == [
        (256, "float32"), (256, "bfloat16"), (1024, "float32"), (1024, "bfloat16")
    ]  # fmt: skip
    for row in answer["attention"]:
        assert row["efficiency"] == pytest.approx(row["speedup"] * row["block_density"])
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])
    shown = bench.run().stdout
    assert "CLEAR r=6 on 1x16x16" in shown
    assert not any(tmp_path.iterdir()), "nothing is kept"
    quantized = json.loads(bench.run("--json", "--quantization", "int8").stdout)
    assert {row["quantization"] for row in quantized["attention"]} == {"int8"}
    assert {row["quantization"] for row in answer["attention"]} == {None}
    assert "must be one of int8" in bench.error("--quantization", "int7")


def test_what_is_calibrated_is_used(bench):
    before = measured_speed("cpu", "float32", 64)
    answer = json.loads(bench.run("--calibrate", "--json").stdout)
    path = calibrated_path(this_machine("cpu"))
    assert answer["file"] == str(path)
    table = SpeedTable.read(path)
    assert json.loads(json.dumps(table.to_dict())) == {k: answer[k] for k in table.to_dict()}
    assert [(case.tokens, case.dtype) for case in table.attention] == [
        (256, "float32"), (1024, "float32"), (256, "bfloat16"), (1024, "bfloat16")
    ]  # fmt: skip
    after = measured_speed("cpu", "float32", 64)
    assert after.efficiency != before.efficiency
    assert (after.shortest, after.another_machine) == (256, False)
    assert after.where == f"on this machine ({this_machine('cpu')})"
    formats = [] if can_run("native", **ASKED) else ["int8", "int8"]
    assert [case.quantization for case in table.quantized if case.dtype == "float32"] == formats
    assert [name for name, _ in after.gains] == formats[:1]
    assert "Break-even lengths" in bench.run("--calibrate").stdout
