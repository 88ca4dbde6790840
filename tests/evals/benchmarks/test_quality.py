"""The table of quality at a density: which rows it has, and what stands in them."""

from pathlib import Path

import pytest

from dit_accel.evals.benchmarks import quality
from dit_accel.evals.benchmarks.quality import Row, Runs, Subject, cells, recipes_of
from dit_accel.patterns import Neighborhood, Rectified

SMALL = {"steps": 3, "at": (0, 2), "size": (128, 128)}


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.of("tiny-flux", scenes=1, **SMALL)


def test_presets_that_fit_and_methods_at_a_density(subject):
    found = list(recipes_of("tiny-flux", [0.6], subject))
    names = {name for name, _ in found}
    assert {"tiny-flux-clear", "Neighborhood", "Routed, top k", "Rectified"} <= names
    assert "tiny-flux-neighborhood" not in names  # its window is larger than this picture
    assert "Radial" not in names  # of videos
    assert all(recipe.dense_steps == 0 and recipe.tail is None for _, recipe in found)


def test_whole_runs_are_compared_with_the_dense_ones(subject):
    runs = subject.compared(subject.generated())
    assert runs.psnr == float("inf")
    assert runs.ssim == 1
    row = quality.measured(subject, "near", quality.Recipe(Neighborhood((1, 3, 3))), repeats=1)
    assert 0 < row.runs.psnr < 60
    assert row.runs.ssim < 1
    assert 0 <= row.runs.attributes <= 1
    assert len(row.calls) == 2
    assert min(row.calls) > 0
    assert row.attention > 0
    assert row.time[0] <= row.time[1] <= row.time[2]


def test_rectified_has_no_row_with_a_tail(subject, monkeypatch):
    both = [("a", quality.Recipe(Neighborhood((1, 3, 3)))), ("b", quality.Recipe(Rectified(block_size=16)))]
    monkeypatch.setattr(quality, "recipes_of", lambda *_: both)
    monkeypatch.setattr(
        quality, "measured", lambda subject, name, recipe, _: (name, recipe.tail, subject.scenes)
    )
    alone = Subject(subject.pipe, subject.run, [], subject.calls, subject.twin)
    rows = [row[:2] for row in quality.measure(alone, "tiny-flux", [0.1], True, 1)]
    assert rows == [("a", None), ("a", "pooled"), ("b", None)]


@pytest.mark.parametrize(
    ("runs", "shown"), [(None, ["-"] * 3), (Runs(31.04, 0.9, 0.75), ["31.0", "0.900", "0.750"])]
)
def test_cells(runs, shown):
    row = Row("radial", True, 0.25, (0.4, 0.5, 0.6), 0.2, (0.1, 0.05), runs)
    assert cells(row) == ["radial", "yes", "0.250", "0.50", "0.200", "0.100", "0.050", *shown]


def test_writes_both_files(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(quality, "recipes_of", lambda *_: [("near", quality.Recipe(Neighborhood((1, 3, 3))))])
    sizes = ["--size", "32", "32", "--steps", "2", "--at", "0", "1", "--repeats", "1"]
    assert quality.main(["tiny-flux", *sizes, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "quality_cpu.md").read_text()
    assert "## tiny-flux, 40 tokens, runs of 2 steps" in text
    assert text.count("| near |") == 2
    assert len((tmp_path / "quality_cpu.csv").read_text().splitlines()) == 1 + 2 * 4
