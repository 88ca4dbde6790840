"""The library's speed table is made of result files; what holds for a dtype and head_dim is read from it."""

from __future__ import annotations

import pytest

from dit_accel.evals.benchmarks.speed_tables import main, table_of_results
from dit_accel.evals.benchmarks.table import RESULTS
from dit_accel.runtime.measured_speed import measured_speed
from dit_accel.runtime.speed_table import SHIPPED, Machine, SpeedTable


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
    rows = [f"k,p,{metric},{shape},{value},,,here,torch 2," for metric, shape, value in rows]
    (tmp_path / "bench_cpu.csv").write_text(header + "\n".join(rows) + "\n")
    rates = measured_speed("cpu", "float32", 128, "m", [table_of_results(tmp_path, "cpu")])
    assert rates.efficiency == (0.6, pytest.approx(0.7), 0.8)
    assert (rates.rest, rates.source, rates.shortest) == (0.4, "2 cases with head_dim 64 on here, torch 2", 9)
    assert measured_speed("cpu", "float32", 40, "other", [table_of_results(tmp_path, "cpu")]).efficiency == (
        0.3,
        0.3,
        0.3,
    )
    assert measured_speed("cpu", "float16", 64, "m", [table_of_results(tmp_path, "cpu")]).efficiency is None


def test_results_of_gpus_lie_in_a_folder_of_their_own(tmp_path):
    rows = ["k,p,block_density,B1-H4-N9-D64-bfloat16 a,0.25,,,a GPU,,"]
    rows += ["k,p,efficiency,B1-H4-N9-D64-bfloat16 a,0.9,,,a GPU,,"]
    header = "kernel,provider,metric,shape,median,p20,p80,device,versions,commit\n"
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "bench_cuda.csv").write_text(header + "\n".join(rows) + "\n")
    assert measured_speed(
        "cuda", "bfloat16", 64, tables=[table_of_results(tmp_path, "cuda")]
    ).efficiency == pytest.approx((0.9,) * 3)
    with pytest.raises(ValueError, match="must hold results of one machine for cpu, found none"):
        table_of_results(tmp_path, "cpu")


def test_a_fixed_cost_is_told_from_cost_by_pairs(tmp_path):
    """Cases that take 5,000 pairs of dense attention and a pair at 0.5 of its rate, one of them disturbed."""
    lines = ["kernel,provider,metric,shape,median,p20,p80,device,versions,commit"]
    for tokens, disturbed in ((100, 1.0), (200, 1.0), (300, 1.3), (400, 1.0), (800, 1.0)):
        pairs = 0.25 * 4 * tokens**2
        efficiency = disturbed / (1 / 0.5 + 5000 / pairs)
        for metric, value in (("block_density", 0.25), ("efficiency", efficiency)):
            lines.append(f"k,p,{metric},B1-H4-N{tokens}-D64-float32 a,{value},,,here,torch 2,")
    (tmp_path / "plan_cpu.csv").write_text("\n".join(lines) + "\n")
    rates = measured_speed("cpu", "float32", 64, tables=[table_of_results(tmp_path, "cpu")])
    assert rates.fixed == pytest.approx(5000)
    assert rates.efficiency == pytest.approx((0.5, 0.5, 1 / ((2 + 5000 / 90_000) / 1.3 - 5000 / 90_000)))


def test_what_is_measured_again_counts_as_it_was_last(tmp_path):
    lines = ["kernel,provider,metric,shape,median,p20,p80,device,versions,commit"]
    for machine, efficiency in (("old", 0.2), ("new", 0.8)):
        for metric, value in (("block_density", 0.25), ("efficiency", efficiency)):
            lines.append(f"k,p,{metric},B1-H4-N9-D64-float32 a,{value},,,{machine},torch 2,")
    (tmp_path / "bench_cpu.csv").write_text("\n".join(lines) + "\n")
    rates = measured_speed("cpu", "float32", 64, tables=[table_of_results(tmp_path, "cpu")])
    assert (rates.efficiency, rates.source) == ((0.8, 0.8, 0.8), "1 cases with head_dim 64 on new, torch 2")


def test_results_of_two_machines_make_no_table(tmp_path):
    lines = ["kernel,provider,metric,shape,median,p20,p80,device,versions,commit"]
    for tokens, machine in ((9, '"One, 2 threads, AMX"'), (10, '"One, 4 threads, AMX"')):
        for metric, value in (("block_density", 0.25), ("efficiency", 0.8)):
            lines.append(f"k,p,{metric},B1-H4-N{tokens}-D64-float32 a,{value},,,{machine},torch 2,")
    (tmp_path / "bench_cpu.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="found One, 2 threads, AMX, torch 2; One, 4 threads, AMX, torch 2"):
        table_of_results(tmp_path)
    (tmp_path / "bench_cpu.csv").write_text("\n".join(lines[:3]) + "\n")
    assert table_of_results(tmp_path).machine == Machine("cpu", "One", 2, "2", "AMX")


@pytest.mark.skipif(not (RESULTS / "bench_cpu.csv").is_file(), reason="no committed results here")
def test_the_library_has_the_committed_results(tmp_path):
    assert main(["--out", str(tmp_path)]) == 0
    assert SpeedTable.read(tmp_path / "cpu.json") == SpeedTable.read(SHIPPED / "cpu.json")
    low, middle, high = measured_speed("cpu", "float32", 64).efficiency
    assert 0 < low <= middle <= high < 1.5
