"""The benchmark of gradients: wrong ones are not timed, files can be read, the goal is one of float32."""

from __future__ import annotations

import csv

import pytest
import torch

from dit_accel.evals.benchmarks import backward as bench
from dit_accel.evals.benchmarks.attention import Case
from dit_accel.evals.benchmarks.table import COLUMNS
from dit_accel.patterns import Clear

SMALL = Case(0.25, Clear(5), (1, 16, 24))
MASK = SMALL.pattern.block_mask(SMALL.layout, (64, 16))


def test_wrong_gradients_are_not_timed(monkeypatch):
    exact = bench.block_sparse_attention
    monkeypatch.setattr(bench, "block_sparse_attention", lambda *a, **kw: exact(*a, **kw) * 1.001)
    monkeypatch.setattr(bench, "interleaved", None)
    with pytest.raises(AssertionError, match="not timed"):
        bench.measure(SMALL, None, torch.float32, MASK, 1)


def test_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "CASES", ((SMALL, None), (SMALL, "pooled")))
    for _ in range(2):
        bench.main(["--repeats", "2", "--out", str(tmp_path)])
    with (tmp_path / bench.CSV).open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == set(COLUMNS)
    assert len(rows) == 2 * 2 * 2 * 3  # appended: two runs of two tails in two dtypes, with three rows each
    table = (tmp_path / bench.PAGE).read_text()
    assert "CLEAR r=5 on 1x16x24 | 384 | float32 | pooled" in table
    assert "CLEAR r=5" in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 3.6), (torch.bfloat16, 100.0)])
def test_goal(dtype, most):
    def result(times):
        return bench.Result(SMALL, None, dtype, MASK, (0, 10.0, 0), (0, 10.0 * times, 0))

    assert result(most).passed
    assert result(most + 0.1).passed is (dtype != torch.float32)
    assert result(2.5).cells()[-2:] == ["2.50", "pass"]
