"""Kernel configurations compiled for every chip without a GPU; prints the table, fails over the limits."""

import pytest
import torch

from dit_accel import BlockMask
from dit_accel.evals import compile_report

triton_kernel = pytest.importorskip("dit_accel.kernels.block_sparse.triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(triton_kernel.INTERPRETED, reason="TRITON_INTERPRET is set: nothing compiles")


@pytest.fixture
def log(capsys):
    """Prints through pytest's capture, so that the table is in every test log."""

    def write(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", end="", flush=True)

    return write


@pytest.mark.slow
@pytest.mark.parametrize("chip", compile_report.CHIPS)
def test_registers_stack_shared_memory_and_instructions(chip, log):
    cases = [case for case in compile_report.GATE if case.chip == chip]
    assert {case.head_dim for case in cases} == {64, 128}
    log(compile_report.HEADER)
    problems = {}
    for case in cases:
        row = compile_report.compile_case(case)
        log(compile_report.line(row))
        problems[str(case)] = row.problems()
    assert not any(problems.values()), problems


def test_limits_are_enforced():
    options = {"TQ": 128, "TK": 64, "num_warps": 8, "num_stages": 5}

    def problems(case, stack=0, shared=0, instructions=("mma.sync", "wgmma", "tcgen05")):
        return compile_report.Row(case, options, 255, stack, shared, instructions).problems()

    case = compile_report.Case("sm_90", 128, "bf16")
    assert problems(case) == []
    assert problems(case, stack=32) == []
    assert problems(case, stack=40) == ["40 bytes of stack per thread, the limit is 32"]
    assert problems(compile_report.Case("sm_90", 128, "fp32"), stack=40, instructions=()) != []
    assert problems(compile_report.Case("sm_80", 64, "fp16"), stack=136) != []
    assert problems(compile_report.Case("sm_120", 64, "fp16"), shared=99 * 1024 + 1) != []
    assert problems(case, instructions=("mma.sync",)) == ["no wgmma in the machine code"]
    assert problems(compile_report.Case("sm_90", 256, "fp32"), stack=4000, instructions=()) == []


@pytest.mark.parametrize(
    "capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
)
@pytest.mark.parametrize("dtype", triton_kernel.DTYPES, ids=["fp16", "bf16", "fp32"])
def test_every_launch_has_a_configuration(capability, dtype):
    for head_dim in (1, 16, 24, 64, 72, 128, 129, 256):
        for bq in triton_kernel.QUERY_BLOCKS:
            for bk in triton_kernel.KEY_BLOCKS:
                options = triton_kernel.config(head_dim, dtype, (bq, bk), capability)
                assert bq % options["TQ"] == 0
                assert bk % options["TK"] == 0
                assert options["num_warps"] in (4, 8)


def test_torch_compile_sees_the_kernel(monkeypatch):
    """Fullgraph; the kernel itself is in the graph, and only its two outputs count as written to."""
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def stop(graph, _example_inputs):
        graphs.append(graph)
        raise StopIteration("nothing to launch on")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    mask = BlockMask.from_token_mask(torch.rand(300, 300) < 0.5)
    q, k, v = torch.randn(3, 2, 300, 3, 64).transpose(2, 3)

    def attention(q, k, v):
        return triton_kernel.attention(q, k, v, mask, scale=0.125, text_valid=None)

    compiled = torch.compile(attention, fullgraph=True, backend=aot_autograd(fw_compiler=stop))
    with compile_report.pretend_gpu((9, 0)), pytest.raises(Exception, match="nothing to launch on"):
        compiled(q, k, v)
    kernels = [n for n in graphs[0].graph.nodes if "triton_kernel_wrapper_functional" in str(n.target)]
    assert len(kernels) == 1
    assert kernels[0].kwargs["tensors_to_clone"] == ["out_ptr", "lse_ptr"]


def test_report_writes_json(tmp_path, capsys, monkeypatch):
    case = compile_report.Case("sm_80", 16, "fp16")
    monkeypatch.setattr(compile_report, "ALL", (case,))
    assert compile_report.main(["--json", str(tmp_path / "report.json")]) == 0
    assert "mma.sync" in capsys.readouterr().out
    text = (tmp_path / "report.json").read_text()
    assert '"head_dim": 16' in text


def test_the_report_lists_what_was_compiled():
    case = compile_report.Case("sm_90", 128, "bf16")
    options = {"TQ": 128, "TK": 64, "num_warps": 8, "num_stages": 2}
    fine = compile_report.Row(case, options, 200, 0, 1024, ("wgmma",))
    broken = compile_report.Row(case, options, 255, 4000, 1024, ("wgmma",))
    text = compile_report.page("3.9", [fine, broken])
    assert "Triton 3.9" in text
    assert "2 configurations, 1 beyond a limit" in text
    assert text.count(compile_report.line(fine)) == 1
