"""Kernels compiled for AMD chips without a GPU."""

import pytest

from dit_accel.evals.benchmarks import compile_report_amd as report

triton_kernel = pytest.importorskip(
    "dit_accel.kernels.block_sparse.triton_forward", reason="Triton is not installed"
)
pytestmark = pytest.mark.skipif(triton_kernel.INTERPRETED, reason="TRITON_INTERPRET is set: nothing compiles")


def test_the_kernel_compiles_for_one_of_them():
    row = report.compile_case(report.Case("gfx1201", 64, "bf16", text=True))
    assert row.problems() == []
    assert any("wmma" in name for name in row.instructions)
    page = report.page("3.9", [row])
    assert "Triton 3.9" in page
    assert "| gfx1201 | bf16 | 64 | forward | 64x64 |" in page


@pytest.mark.slow
@pytest.mark.parametrize("chip", report.WAVE)
def test_all_that_is_asked_for_compiles(chip):
    rows = [report.compile_case(case) for case in report.CASES if case.chip == chip]
    assert not any(row.problems() for row in rows), report.page("", rows)


def test_limits_are_enforced():
    def problems(dtype="bf16", head_dim=128, spilled=0, shared=0, instructions=("v_wmma",)):
        case = report.Case("gfx1100", head_dim, dtype)
        return report.Row(case, {}, 256, spilled, 4 * spilled, shared, instructions).problems()

    assert problems() == []
    assert problems(spilled=1) == ["1 registers spilled, none may be at this head_dim"]
    assert problems(spilled=9, head_dim=256) == []
    assert len(problems(dtype="fp32", spilled=1)) == 1
    assert problems(dtype="fp32", instructions=()) == []
    assert problems(instructions=()) == ["no products of matrices in the machine code"]
    assert problems(shared=65537) == ["65537 bytes of local memory, gfx1100 has 65536"]
