"""The cost of being on: what is compared is the same work, break-even is interpolated, files can be read."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.evals.benchmarks import overhead
from dit_accel.evals.benchmarks.scaling import Curve, Point, Setting
from dit_accel.evals.benchmarks.table import COLUMNS
from dit_accel.patterns import Clear, Dense

TINY = Setting("cpu", torch.float32, 2, 16)


@pytest.mark.parametrize(
    ("speedups", "found"),
    [
        ([0.5, 2.0, 4.0], math.sqrt(100 * 400)),  # 1 is half-way between 1/2 and 2
        ([1.5, 0.25, 2.0], 400 * 4 ** (2 / 3)),  # what counts is the last crossing
        ([1.1, 1.2, 3.0], 100),
        ([0.5, 2.0, 0.9], None),
        ([0.5, 1.0, 1.5], 400),
    ],
)
def test_crossing(speedups, found):
    crossing = overhead.crossing([100, 400, 1600], speedups)
    assert crossing is None if found is None else crossing == pytest.approx(found)


def test_less_than_nothing_beside_a_kernel_is_nothing():
    """On a busy machine a layer may have seemed to take less than its kernel."""
    points = [Point(n, 0.1, 0.1, (1, 1, 1), (2 / k, 2 / k, 2 / k)) for n, k in ((100, 1), (400, 4))]
    noise, nothing = (overhead.BreakEven(0.1, Curve(None, tuple(points)), ms) for ms in (-3.0, 0.0))
    assert noise.tokens == nothing.tokens == pytest.approx(200)


@pytest.mark.parametrize("side", overhead.SIDES[2:])
@pytest.mark.parametrize("density", overhead.DENSITIES)
def test_discs_have_the_density_asked_for(density, side):
    assert overhead.disc(density, side).density(TokenLayout((1, side, side))) == pytest.approx(
        density, rel=0.3
    )


def pair(untouched: float, enabled: float, seen: list):
    def timer(*runs):
        seen.append([getattr(output, "sample", output) for output in (run() for run in runs)])
        return [(0.9 * ms, ms, 1.1 * ms) for ms in (untouched, enabled)]

    return timer


def test_dense_gives_the_same_bits_and_has_no_sparse_layer():
    seen = []
    with torch.inference_mode():
        dense = overhead.calls(Dense(), overhead.SMALLEST, pair(10.0, 10.2, seen))
    assert (dense.name, dense.layers) == ("tiny-flux 64x64", 0)
    assert dense.added == pytest.approx(0.2)
    assert torch.equal(*seen[0])


def test_a_layer_that_covers_everything_does_dense_work():
    seen = []
    with torch.inference_mode():
        layer = overhead.calls(overhead.EVERYTHING, overhead.SMALLEST, pair(10.0, 10.6, seen))
        torch.testing.assert_close(*seen[0], rtol=0, atol=1e-4)
        less = overhead.calls(Clear(2), overhead.SMALLEST, pair(10.0, 10.6, seen))
    assert layer.layers == less.layers == 6
    assert layer.per_layer == pytest.approx(0.1 - 0.6)  # 0.6 ms: what the timer gives for the kernels too
    torch.testing.assert_close(*seen[1], rtol=0, atol=1e-5)
    assert (seen[2][0] - seen[2][1]).abs().max() > 1e-3


def test_files(tmp_path, monkeypatch, capsys):
    milliseconds = {"dense": 10.0, "enabled": 10.2}
    monkeypatch.setattr(overhead, "calls", lambda pattern, size, timer: overhead.Calls(
        "tiny", 4, (9.0, milliseconds["dense"], 11.0), (9.0, milliseconds["enabled"], 11.0),
        ((0.1, 0.2, 0.3), (0.1, 0.2, 0.3))))  # fmt: skip
    monkeypatch.setattr(overhead, "CPU", TINY)
    monkeypatch.setattr(overhead, "SIDES", (8, 16))

    def timed(*runs_and_repeats, **_):
        n = runs_and_repeats[0]().shape[2]
        return [
            (0.5 * n, n / 64, 2.0 * n),
            (0.1, 2.0, 3.0),
        ]  # kernels are as fast at 128 tokens

    monkeypatch.setattr(overhead, "interleaved", timed)
    assert overhead.main(["--out", str(tmp_path)]) == 1  # 2% is more than 1%
    milliseconds["enabled"] = 10.05
    assert overhead.main(["--out", str(tmp_path)]) == 0
    with (tmp_path / "overhead_cpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert len(lines) == 2 * (6 + 3 * (2 * 2 + 1))
    found = [float(line["median"]) for line in lines if line["metric"] == "tokens"]
    assert found == pytest.approx([64 * (2 + 0.2 / 4)] * 3 + [64 * (2 + 0.05 / 4)] * 3)
    page = (tmp_path / "overhead_cpu.md").read_text()
    assert "| tiny | 10.00 | 10.05 | 0.50% |" in page
    assert "at most 1% of a step of tiny, is met" in page
    assert "| 0.25 | 129 | 4.000 | 0% |" in page
    assert page in capsys.readouterr().out
