"""The check of plans: cases are held out, rates are what was measured, wrong predictions fail."""

from __future__ import annotations

import csv

import pytest
import torch

from dit_accel.evals.benchmarks import plan_check
from dit_accel.evals.benchmarks.plan_check import CALIBRATION, CASES, Case, Times
from dit_accel.evals.benchmarks.speed_tables import table_of_results
from dit_accel.pipelines import tiny
from dit_accel.recipe.recipe import resolve
from dit_accel.runtime.measured_speed import MeasuredSpeed, measured_speed

HELD_OUT = Case("tiny-flux", 512, 512, None, "tiny-flux-neighborhood")
CASE = Case("tiny-flux", 192, 160, None, "tiny-flux-neighborhood")


def test_ten_cases_none_of_which_is_calibrated_on():
    assert len(set(CASES)) == 10
    calibrated = {(case.model, case.size) for case in CALIBRATION}
    assert not calibrated & {(case.model, case.size) for case in CASES}
    assert {case.model for case in CALIBRATION} == {case.model for case in CASES} == set(tiny.NAMES)
    assert all(resolve(case.recipe).family == tiny.INFO[case.model].family for case in CASES + CALIBRATION)


def measure_like(monkeypatch, times: dict[Case, Times]) -> None:
    monkeypatch.setattr(plan_check, "measure", lambda case, planned, repeats: times[case])


@pytest.mark.parametrize("wrong", [1.0, 1.24, 1.4])
def test_predictions_are_held_against_what_is_measured(monkeypatch, tmp_path, capsys, wrong):
    known = HELD_OUT.plan()
    flops, layer = known.flops, next(iter(known.flops.layers.values()))
    times, layers = (10.0, 10.0 * known.mask.block_density / 0.6), flops.attention / layer
    rest = 10.0 * flops.rest / layer / 0.5  # at half of attention's rate
    calibration = Times(times, tuple(ms * layers + rest for ms in times))
    planned = CASE.plan(MeasuredSpeed((0.6, 0.6, 0.6), 0.5))
    exact = Times((planned.attention.predicted, 1.0), (planned.step.predicted * wrong, 1.0))
    measure_like(monkeypatch, {HELD_OUT: calibration, CASE: exact})
    (result,) = plan_check.run((HELD_OUT,), (CASE,), tmp_path, 1)
    assert result.errors == pytest.approx((0, 1 / wrong - 1), abs=1e-3)
    assert result.passed == (wrong < 1.3)
    rates = measured_speed("cpu", "float32", 32, "tiny-flux", [table_of_results(tmp_path)])
    assert rates.efficiency == pytest.approx((0.6, 0.6, 0.6), rel=1e-3)
    assert rates.rest == pytest.approx(0.5, rel=1e-3)
    with (tmp_path / "plan_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    metrics = ["block_density", "efficiency", "rest_rate", *["attention_speedup"] * 2, *["step_speedup"] * 2]
    assert [row["metric"] for row in rows] == metrics
    table = (tmp_path / "plan_cpu.md").read_text()
    assert ("| yes |" if result.passed else "| NO |") in table
    assert CASE.recipe in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_timed_is_the_real_thing():
    with torch.inference_mode():
        times = plan_check.measure(CASE, CASE.plan(), 1)
    assert min(*times.attention, *times.step) > 0
