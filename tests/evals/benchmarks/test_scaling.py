"""The scaling series: tokens double, exponents are fitted, wrong kernels are not timed, files can be read."""

from __future__ import annotations

import csv
import itertools

import pytest
import torch
from PIL import Image

from dit_accel import TokenLayout
from dit_accel.evals.benchmarks import attention as bench
from dit_accel.evals.benchmarks import scaling
from dit_accel.evals.benchmarks.scaling import CPU, CPU_SERIES, Curve, Point, Series, Setting
from dit_accel.evals.benchmarks.table import COLUMNS
from dit_accel.patterns import Clear, Dense

TINY = Setting("cpu", torch.float32, 2, 16)
GRIDS = ((1, 8, 8), (1, 8, 16), (1, 16, 16), (1, 16, 32))
SMALL = (Series("CLEAR r=3", Clear(3), GRIDS), Series("dense", Dense(), GRIDS))
HERE = {
    "python": "3", "commit": "abc", "cuda": "12",
    "packages": {"dit-accel": "0", "torch": "2", "triton": "3"},
    "cpu": {"name": "a processor", "torch_threads": 2, "instructions": "AVX2"}, "gpus": [{"name": "a GPU"}],
}  # fmt: skip


def like(*powers: float):
    """A timer under which calls take tokens^power milliseconds, by the series' doubling lengths."""
    lengths = itertools.cycle(64 * 2**i for i in range(4))

    def timer(*runs):
        for run in runs:
            run()
        n = next(lengths)
        return [(0.9 * n**power, n**power, 1.1 * n**power) for power in powers]

    return timer


@pytest.mark.parametrize("series", CPU_SERIES, ids=lambda s: f"{s.name}-{s.grids[0]}")
def test_tokens_double_and_pairs_grow_as_the_pattern_should(series):
    tokens = [TokenLayout(grid).seq_len for grid in series.grids]
    assert [n / tokens[0] for n in tokens] == [1, 2, 4, 8]
    density = [series.pattern.density(TokenLayout(grid)) for grid in series.grids]
    found = scaling.exponent(tokens, [d * n**2 for d, n in zip(density, tokens, strict=True)])
    low, high = {"radial": (1.1, 1.5), "dense": (2, 2)}.get(series.name, (0.99, 1.1))
    assert low - 1e-9 <= found <= high + 1e-9


def test_cpu_lengths():
    assert (CPU.heads, CPU.head_dim, CPU.dtype) == (4, 64, torch.float32)
    for series in CPU_SERIES:
        assert [TokenLayout(grid).seq_len for grid in series.grids] == [2048, 4096, 8192, 16384]


def test_exponent_is_the_slope_of_the_least_squares_line():
    assert scaling.exponent([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1)
    assert scaling.exponent([10, 20, 40], [2 * n**1.5 for n in (10, 20, 40)]) == pytest.approx(1.5)
    # by hand, in powers of two: x = 0, 1, 2 and y = 0, 0, 3 give (0 * -1 + 0 * 0 + 3 * 1) / 2
    assert scaling.exponent([1, 2, 4], [1, 1, 8]) == pytest.approx(1.5)


def test_files(tmp_path):
    for _ in range(2):
        assert scaling.run(SMALL, TINY, like(2, 1.25), tmp_path, HERE) == 0
    with (tmp_path / "scaling_cpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert len(lines) == 2 * 2 * (4 * 5 + 3)  # appended: two runs of two series
    fitted = {
        (r["provider"], r["metric"], r["shape"]): float(r["median"]) for r in lines if "exp" in r["metric"]
    }
    assert fitted["auto", "exponent", "CLEAR r=3"] == pytest.approx(1.25)
    assert fitted["sdpa", "exponent", "CLEAR r=3"] == pytest.approx(2)
    assert fitted["auto", "pairs_exponent", "dense"] == pytest.approx(2)
    assert lines[0]["shape"] == "B1-H2-N64-D16-float32 CLEAR r=3"
    page = (tmp_path / "scaling_cpu.md").read_text()
    assert "| CLEAR r=3 | 1.25 |" in page
    assert "scaling_cpu.png" in page
    with Image.open(tmp_path / "scaling_cpu.png") as image:
        assert image.size == (960, 660)
        assert len(image.convert("RGB").getcolors(2**20)) > 50  # lines, not an empty sheet


def test_a_wrong_kernel_is_not_timed(monkeypatch, tmp_path, capsys):
    exact = bench.block_sparse_attention
    monkeypatch.setattr(bench, "block_sparse_attention", lambda *a: exact(*a) * 1.001)
    assert scaling.run(SMALL, TINY, None, tmp_path, HERE) == 2
    assert "not timed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_timed_is_attention_itself():
    """Both calls of every length, in full: SDPA first, then the kernel under the pattern's mask."""
    seen = []

    def timer(*runs):
        seen.append([run() for run in runs])
        return [(1.0, 2.0, 3.0), (0.5, 1.0, 1.5)]

    curve = scaling.measure(SMALL[1], TINY, timer)  # dense: the two must agree
    assert (
        [point.tokens for point in curve.points] == [out[0].shape[2] for out in seen] == [64, 128, 256, 512]
    )
    for plain, ours in seen:
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    assert curve.points[0].speedup == 2


def test_gpu_rows_name_the_gpu():
    curve = Curve(SMALL[0], tuple(Point(n, 0.5, 0.6, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)) for n in (64, 128)))
    first = next(iter(scaling.rows(curve, Setting("cuda", torch.bfloat16, 24, 128), HERE)))
    assert first["device"] == "a GPU"
    assert "triton 3" in first["versions"]
    assert first["shape"].startswith("B1-H24-N64-D128-bfloat16")
