"""The CPU benchmark: cases are what they claim, wrong kernels are not timed, files can be read."""

from __future__ import annotations

import csv

import pytest
import torch

from dit_accel.evals.benchmarks import attention as bench
from dit_accel.evals.benchmarks import mask_building as bench_masks
from dit_accel.evals.benchmarks.table import COLUMNS
from dit_accel.patterns import Clear

SMALL = bench.Case(0.25, Clear(5), (1, 16, 24))


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.name)
def test_cases_have_the_densities_they_claim(case):
    assert case.layout.seq_len in (8192, bench.LONG)
    low, high = {0.1: (0.08, 0.12), 0.25: (0.22, 0.28), 0.5: (0.45, 0.55)}[case.near]
    assert low <= case.pattern.density(case.layout) <= high


def test_every_pattern_has_every_density_at_both_lengths():
    found = {(type(c.pattern), c.near, c.layout.seq_len) for c in bench.CASES}
    assert len(found) == len(bench.CASES) == 3 * 3 * 2


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    mask = SMALL.pattern.block_mask(SMALL.layout, (64, 16))
    exact = bench.block_sparse_attention
    monkeypatch.setattr(bench, "block_sparse_attention", lambda *a, **kw: exact(*a, **kw) * 1.001)
    monkeypatch.setattr(bench, "interleaved", None)
    with pytest.raises(AssertionError, match="not timed"):
        bench.measure(SMALL, torch.float32, mask, 1)


def test_a_mask_of_another_density_is_not_timed():
    with pytest.raises(AssertionError, match="density"):
        bench.measure(SMALL, torch.float32, Clear(4).block_mask(SMALL.layout, (64, 16)), 1)


def test_files(tmp_path, monkeypatch, capsys):
    measured = {"seconds": 1.0, "gib": 0.5, "density": 0.1, "block_density": 0.2, "passed": True}
    masks = [{"case": bench_masks.MASK_CASES[0], "block_size": (64, 16), **measured}]
    monkeypatch.setattr(bench, "CASES", (SMALL,))
    monkeypatch.setattr(bench, "measure_masks", lambda: masks)
    for _ in range(2):
        bench.main(["--repeats", "2", "--out", str(tmp_path)])
    with (tmp_path / "bench_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == set(COLUMNS)
    assert len(rows) == 2 * (
        2 * 6 + 2
    )  # appended: two runs of two dtypes with six rows each, and a mask with two
    assert all(float(row["p20"]) <= float(row["median"]) <= float(row["p80"]) for row in rows)
    table = (tmp_path / "bench_cpu.md").read_text()
    assert "CLEAR r=5 on 1x16x24" in table
    assert "HunyuanVideo 720p" in table
    assert "CLEAR r=5" in capsys.readouterr().out


def test_goals():
    def result(case, speedup, block_density, density):
        return bench.Result(
            case, torch.float32, (64, 16), density, block_density, (0, speedup, 0), (0, 1.0, 0)
        )

    case = next(c for c in bench.CASES if c.near == 0.25 and c.layout.seq_len == bench.LONG)
    assert result(case, 2.4, 0.375, 0.25).missed() == []
    assert len(result(case, 1.9, 0.3, 0.25).missed()) == 2
    assert result(case, 2.4, 0.45, 0.25).missed() == ["block density > 1.6 x density"]


@pytest.mark.slow
def test_building_is_measured_in_its_own_process(monkeypatch):
    monkeypatch.setattr(bench_masks, "GPU_BLOCKS", bench_masks.default_block_size("cpu"))
    rows = bench_masks.measure_masks()
    assert len(rows) == len(bench_masks.MASK_CASES)
    assert all(row["seconds"] > 0 for row in rows)
    assert all(0 <= row["gib"] < bench_masks.GIBIBYTES for row in rows)
