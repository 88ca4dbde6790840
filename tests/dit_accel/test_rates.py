"""Rates: read from result files, by dtype and nearest head_dim."""

from __future__ import annotations

import pytest

from dit_accel.rates import RESULTS, Rates, measured


def test_rates_are_read_from_the_nearest_head_dim(tmp_path):
    header = "kernel,provider,metric,shape,median,p20,p80,device,versions,commit\n"
    rows = [
        ("efficiency", "B1-H4-N9-D64-float32 a", 0.6),
        ("efficiency", "B1-H4-N9-D64-float32 b", 0.8),
        ("efficiency", "B1-H4-N9-D32-float32 a", 0.3),
        ("efficiency", "B1-H4-N9-D64-bfloat16 a", 1.0),
        ("speedup", "B1-H4-N9-D64-float32 a", 9),
        ("rest_rate", "m-float32", 0.4),
    ]
    shapes = {shape for metric, shape, _ in rows if metric == "efficiency"}
    rows = [*(("block_density", shape, 0.25) for shape in shapes), *rows]
    rows = [f"k,p,{metric},{shape},{value},,,here,," for metric, shape, value in rows]
    (tmp_path / "bench_cpu.csv").write_text(header + "\n".join(rows) + "\n")
    rates = measured("cpu", "float32", 128, "m", tmp_path)
    assert rates == Rates((0.6, pytest.approx(0.7), 0.8), 0.4, "2 cases with head_dim 64 on here", shortest=9)
    assert measured("cpu", "float32", 40, "other", tmp_path).efficiency == (0.3, 0.3, 0.3)
    assert measured("cpu", "float16", 64, "m", tmp_path).efficiency is None


def test_a_fixed_cost_is_told_from_cost_by_pairs(tmp_path):
    """Cases that take 5,000 pairs of dense attention and a pair at 0.5 of its rate, one of them disturbed."""
    lines = ["kernel,provider,metric,shape,median,p20,p80,device,versions,commit"]
    for tokens, disturbed in ((100, 1.0), (200, 1.0), (300, 1.3), (400, 1.0), (800, 1.0)):
        pairs = 0.25 * 4 * tokens**2
        efficiency = disturbed / (1 / 0.5 + 5000 / pairs)
        for metric, value in (("block_density", 0.25), ("efficiency", efficiency)):
            lines.append(f"k,p,{metric},B1-H4-N{tokens}-D64-float32 a,{value},,,here,,")
    (tmp_path / "plan_cpu.csv").write_text("\n".join(lines) + "\n")
    rates = measured("cpu", "float32", 64, folder=tmp_path)
    assert rates.fixed == pytest.approx(5000)
    assert rates.efficiency == pytest.approx((0.5, 0.5, 1 / ((2 + 5000 / 90_000) / 1.3 - 5000 / 90_000)))


def test_what_is_measured_again_counts_as_it_was_last(tmp_path):
    lines = ["kernel,provider,metric,shape,median,p20,p80,device,versions,commit"]
    for machine, efficiency in (("old", 0.2), ("new", 0.8)):
        for metric, value in (("block_density", 0.25), ("efficiency", efficiency)):
            lines.append(f"k,p,{metric},B1-H4-N9-D64-float32 a,{value},,,{machine},,")
    (tmp_path / "bench_cpu.csv").write_text("\n".join(lines) + "\n")
    rates = measured("cpu", "float32", 64, folder=tmp_path)
    assert (rates.efficiency, rates.source) == ((0.8, 0.8, 0.8), "1 cases with head_dim 64 on new")


@pytest.mark.skipif(not (RESULTS / "bench_cpu.csv").is_file(), reason="no committed results here")
def test_committed_results_are_found():
    low, middle, high = measured("cpu", "float32", 64).efficiency
    assert 0 < low <= middle <= high < 1.5
