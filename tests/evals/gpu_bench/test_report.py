"""Rows in words, as CSV that plans read, and as a page."""

import csv

import pytest

from dit_accel.evals.benchmarks.speed_tables import table_of_results
from dit_accel.evals.benchmarks.table import append
from dit_accel.evals.gpu_bench import cases, report
from dit_accel.kernels.block_sparse.tuned import Launch
from dit_accel.runtime.measured_speed import measured_speed

HERE = {
    "python": "3", "commit": "abc", "cuda": "12", "packages": {"dit-accel": "0", "torch": "2", "triton": "3"},
    "cpu": {"name": "a processor", "torch_threads": 2}, "gpus": [{"name": "a GPU"}],
}  # fmt: skip
MACHINE = {"kind": "machine", "job": "probe", "environment": HERE, "capability": [9, 0]}
CASE = cases.SHAPES[0]


def timed(provider, ms, *, sparse=False, exact=True, ours=False):
    return {
        "kind": "time", "job": f"{CASE.title}: {provider}", "case": [CASE.name, CASE.preset],
        "provider": provider, "sparse": sparse, "exact": exact, "ours": ours, "dtype": "bfloat16",
        "density": 0.1, "block_density": 0.2, "tflops": 100.0, "ms": ms, "p20": 0.9 * ms, "p80": 1.1 * ms,
        "repeats": 9, "clock": None,
    }  # fmt: skip


ROWS = [
    timed("sdpa-cudnn", 8.0),
    timed("sdpa-flash", 9.0),
    timed("sageattention", 1.0, exact=False),
    timed("triton", 2.0, sparse=True, ours=True),
    timed("flex", 4.0, sparse=True),
]


def written(tmp_path):
    yardsticks, path = report.Yardsticks(), tmp_path / "bench_cuda.csv"
    for row in ROWS:
        yardsticks.see(row)
        append(path, report.csv_rows(row, yardsticks, HERE, "cuda"))
    with path.open() as file:
        return list(csv.DictReader(file))


def test_speed_ups_are_to_the_fastest_exact_dense_attention(tmp_path):
    speedup = {row["provider"]: row["median"] for row in written(tmp_path) if row["metric"] == "speedup"}
    assert speedup == {
        "sdpa-cudnn": "1", "sdpa-flash": "0.8889", "sageattention": "8", "triton": "4", "flex": "2"
    }  # fmt: skip


def test_plans_read_our_kernel_alone(tmp_path):
    rows = [row for row in written(tmp_path) if row["metric"] == "efficiency"]
    assert [(row["provider"], row["median"]) for row in rows] == [("triton", "0.8")]
    rates = measured_speed("cuda", "bfloat16", 128, tables=[table_of_results(tmp_path, "cuda")])
    assert rates.efficiency == pytest.approx((0.8, 0.8, 0.8))
    assert "a GPU" in rates.source


def test_backward_passes_beside_their_forward():
    backward = timed("triton", 7.0, sparse=True) | {"kind": "backward"}
    rows = list(report.csv_rows(backward, report.Yardsticks(), HERE, "cuda"))
    assert [(row["kernel"], row["metric"]) for row in rows] == [
        ("block_sparse_backward", "ms"), ("block_sparse_backward", "tflops"),
    ]  # fmt: skip
    page = report.page([MACHINE, *ROWS, backward], [], "cuda")
    assert "| flux-2048 | flux-clear-r16 | 0.2000 | triton | 7.000 | 100 | 3.50 |" in page


def test_without_a_yardstick_there_is_no_speed_up():
    rows = list(report.csv_rows(ROWS[3], report.Yardsticks(), HERE, "cuda"))
    assert {row["metric"] for row in rows} == {"ms", "tflops", "density", "block_density"}


def test_rows_of_steps():
    dense = {
        "kind": "step", "step": "flux.1-dev 1024x1024", "recipe": None, "dtype": "bfloat16", "ms": 6.0,
        "p20": 5.0, "p80": 7.0,
    }  # fmt: skip
    sparse = dense | {"recipe": "near", "ms": 2.0, "density": 0.3, "block_density": 0.4}
    (row,) = report.csv_rows(dense, report.Yardsticks(), HERE, "cuda")
    assert (row["provider"], row["shape"]) == ("dense", "flux.1-dev 1024x1024 bfloat16")
    rows = list(report.csv_rows(sparse, report.Yardsticks(), HERE, "cuda"))
    assert [row["metric"] for row in rows] == ["ms", "density", "block_density"]
    assert rows[0]["shape"] == "flux.1-dev 1024x1024 near bfloat16"
    page = report.page([MACHINE, dense, sparse], [], "cuda")
    assert "| flux.1-dev 1024x1024 | near | 0.3000 | 0.4000 | 6.0 | 2.0 | 3.00 |" in page


def test_the_page():
    wrong = {"kind": "wrong", "job": "x: triton", "reason": "error 7.00 times what is allowed, not timed"}
    left_out = {"kind": "left out", "job": "y: flex", "reason": "no time left in its phase"}
    page = report.page([MACHINE, *ROWS, wrong, left_out], [], "cuda")
    assert "a GPU, torch 2, triton 3, CUDA 12, commit abc" in page
    assert "| flux-2048 | flux-clear-r16 | 0.2000 | triton | 2.000 | 100 | 4.00 | 0.80 |" in page
    assert "| flux-2048 | all pairs | 1.0000 | sdpa-cudnn | 8.000 | 100 | 1.00 | 1.00 |" in page
    assert "- x: triton: WRONG, error 7.00" in page
    assert "- y: flex: no time left in its phase" in page
    assert "Rehearsal" not in page
    assert report.page([], [], "cpu").startswith("# Rehearsal without a GPU\n\nan unknown machine")


def test_launches_right_in_every_check_of_a_head_dim():
    def check(launch, head_dim, right):
        return {"kind": "check", "launch": launch, "head_dim": head_dim, "right": right}

    first, second = [64, 32, 4, 2], [128, 64, 8, 5]
    rows = [
        check(first, 64, True), check(first, 64, True), check(first, 128, False), check(first, 128, True),
        check(second, 64, True), check(None, 64, True), {"kind": "left out"},
    ]  # fmt: skip
    assert report.right_launches(rows) == {64: [Launch(*first), Launch(*second)]}
    assert [report.is_wrong(row) for row in rows] == [False, False, True, False, False, False, False]
