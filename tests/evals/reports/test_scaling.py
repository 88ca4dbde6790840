"""The page's tables of GPUs on paper are what the program writes."""

from __future__ import annotations

from pathlib import Path

from dit_accel.evals.reports import marked, scaling

PAGE = (Path(__file__).parents[3] / "docs/parallel.md").read_text()


def test_page_has_a_row_for_every_case():
    for name, cases in (("strong", scaling.STRONG), ("weak", scaling.WEAK)):
        rows = marked.region(PAGE, name).splitlines()[2:]
        assert [row.split("|")[1:3] for row in rows] == [[f" {w}x{h} ", f" {n} "] for (w, h), n in cases]


def test_as_many_pixels_for_each_gpu():
    assert {width * height // gpus for (width, height), gpus in scaling.WEAK} == {1024**2}
    assert {(4096, 4096), (8192, 8192)} <= {size for size, _ in scaling.WEAK}


def test_rows_are_what_is_planned():
    rows = scaling.table(scaling.WEAK_RECIPE, scaling.WEAK[:2], weak=True).splitlines()[2:]
    assert set(rows) <= set(marked.region(PAGE, "weak").splitlines())
