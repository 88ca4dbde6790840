"""The plan of the GPU benchmark, and its answer where there is no GPU."""

import pytest
import torch

from dit_accel.evals import gpu_bench


@pytest.mark.parametrize(
    "case", gpu_bench.CASES, ids=lambda case: f"{case.name}-{type(case.pattern).__name__}"
)
def test_patterns_fit_their_geometries(case):
    assert 0 < case.pattern.density(case.layout) < 0.7
    assert 0 < case.small_pattern.density(case.small) < 1
    assert type(case.pattern) is type(case.small_pattern)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_prints_the_plan(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert gpu_bench.main() == 3
    assert "wan-720p" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
