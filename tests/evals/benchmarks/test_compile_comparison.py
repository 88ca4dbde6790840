"""Compiled kernels side by side: which rows are compared, and where their figures stand."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from dit_accel.evals.benchmarks import compile_comparison
from dit_accel.evals.benchmarks.compile_cases import ALL, Case
from dit_accel.evals.benchmarks.compile_report import Row
from dit_accel.evals.benchmarks.machine_code import Loop

OPTIONS = {"TQ": 128, "TK": 32, "num_warps": 8, "num_stages": 3}


def report(*cases: Case, **details) -> dict:
    rows = [Row(case, OPTIONS, 200, 8, 1024, ("wgmma",), (), (4, 5), (), **details) for case in cases]
    return json.loads(
        json.dumps({"triton": "3.9", "rows": [asdict(r) | {"problems": r.problems()} for r in rows]})
    )


def lines(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| sm_")]


def test_kernels_of_a_configuration_are_next_to_each_other_the_one_with_pointers_first():
    found = lines(compile_comparison.page(report(*reversed(ALL))))
    kernels = {}
    for chip, part, head_dim, kernel, *_ in found:
        kernels.setdefault((chip, part, head_dim), []).append(kernel.split()[0])
    names = ["pointers", "TMA", "Gluon"]
    for own in kernels.values():
        assert own == sorted(own, key=names.index)
        assert "pointers" in own
    assert len(kernels) == len({tuple(line[:3]) for line in found})
    assert set(kernels["sm_90", "forward", "128"]) == set(names)
    assert set(kernels["sm_80", "dQ", "64"]) == {"pointers"}
    assert "sm_90" in {line[0] for line in found if line[1] == "forward, int8"}
    assert {line[2] for line in found} == {"64", "128"}, "those that limits hold for"


def test_figures_stand_under_their_headings():
    loops = (Loop(400, 12, 3, 0), Loop(300, 12, 2, 1), Loop(300, 12, 2, 1))
    (line,) = lines(compile_comparison.page(report(Case("sm_90", 64, "bf16", text=True), loops=loops)))
    found = dict(zip(compile_comparison.HEADINGS, line, strict=True))
    assert found["instructions for 64 keys"] == "600 / 800", "of turns of 32 keys"
    assert (found["CTA-wide barriers"], found["fences"]) == ("2 / 3", "1 / 0")
    assert (found["registers"], found["stack"], found["shared bytes"]) == ("200", "8", "1024")
    assert (found["waits"], found["warps / stages"], found["rows x keys"]) == ("5", "8 / 3", "128x32")


def test_what_breaks_a_limit_is_counted():
    text = compile_comparison.page(report(*(Case("sm_90", d, "bf16", text=True) for d in (64, 128))))
    assert "2 configurations, 2 beyond a limit" in text  # 5 waits where 4 were asked for


def test_the_page_is_written_from_a_report(tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(report(Case("sm_90", 64, "bf16", text=True))))
    page = tmp_path / "page.md"
    assert compile_comparison.main([str(tmp_path / "report.json"), "--markdown", str(page)]) == 0
    assert len(lines(page.read_text())) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"triton": "3.9"}', '{"triton": "3.9", "rows": [{"case": {}}]}'])
def test_another_file_is_refused(tmp_path, capsys, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(SystemExit):
        compile_comparison.main([str(tmp_path / "report.json"), "--markdown", str(tmp_path / "page.md")])
    assert "is not what `compile_report --json` writes" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()
