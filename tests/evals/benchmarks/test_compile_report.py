"""Kernel configurations compiled for every chip without a GPU; prints the table, fails over the limits.

The installed Triton compiles them, and a second one where there is one: `make old-triton` makes its
environment, or OTHER_TRITON_PYTHON names a Python that has it.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from dit_accel import BlockMask
from dit_accel.evals.benchmarks import compile_report
from dit_accel.evals.benchmarks.machine_code import Loop
from dit_accel.kernels.block_sparse import triton_configs
from dit_accel.kernels.block_sparse.formats import FORMATS, key_group
from dit_accel.kernels.block_sparse.triton import DTYPES, KEY_BLOCKS, QUERY_BLOCKS

ROOT = Path(__file__).parents[3]
OTHER = Path(os.environ.get("OTHER_TRITON_PYTHON", ROOT / ".venv-triton-3.6/bin/python"))


triton_kernel = pytest.importorskip(
    "dit_accel.kernels.block_sparse.triton_forward", reason="Triton is not installed"
)
pytestmark = pytest.mark.skipif(triton_kernel.INTERPRETED, reason="TRITON_INTERPRET is set: nothing compiles")


@pytest.fixture
def log(capsys):
    """Prints through pytest's capture, so that the table is in every test log."""

    def write(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", end="", flush=True)

    return write


def kind(case):
    """What a case compiles, whatever its head_dim and chip; () is what most do."""
    others = () if case.block_size == (128, 64) else case.block_size
    parts = (case.dtype, case.text, case.format, case.part, case.kernel, case.ping_pong, *others)
    return tuple(str(part) for part in parts if part not in ("bf16", False, None, "forward", "pointer"))


def shared_out(chip):
    """What most do with both head_dims, all else with one, and with the other on the next chip.

    Each compiles for seconds; `python -m dit_accel.evals.benchmarks.compile_report --gate` takes them all.
    """
    kinds = sorted({kind(case) for case in compile_report.GATE})
    turn = list(compile_report.CHIPS).index(chip)

    def mine(case):
        return (
            kind(case) == ()
            or case.kernel == "gluon"
            or (case.head_dim // 64 + kinds.index(kind(case)) + turn) % 2
        )

    return [case for case in compile_report.GATE if case.chip == chip and mine(case)]


def test_all_that_is_gated_is_shared_out():
    taken = [case for chip in compile_report.CHIPS for case in shared_out(chip)]
    assert {(kind(case), case.head_dim) for case in taken} == {
        (kind(case), case.head_dim) for case in compile_report.GATE
    }
    for chip in compile_report.CHIPS:
        assert {kind(case) for case in shared_out(chip)} == {
            kind(case) for case in compile_report.GATE if case.chip == chip
        }


@pytest.mark.slow
@pytest.mark.parametrize("chip", compile_report.CHIPS)
def test_registers_stack_shared_memory_and_instructions(chip, log):
    cases = shared_out(chip)
    assert {case.head_dim for case in cases} == {64, 128}
    log(compile_report.HEADER)
    problems = {}
    for case in cases:
        row = compile_report.compile_case(case)
        log(compile_report.line(row))
        problems[str(case)] = row.problems()
    assert not any(problems.values()), problems


@pytest.mark.slow
@pytest.mark.skipif(
    not OTHER.exists(),
    reason=f"no second Triton at {OTHER}: `make old-triton`, or set OTHER_TRITON_PYTHON to a Python with one",
)
def test_the_same_under_another_triton(tmp_path, log):
    file = tmp_path / "report.json"
    command = [OTHER, "-m", "dit_accel.evals.benchmarks.compile_report", "--gate", "--json", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    log(done.stdout)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    import triton

    assert report["triton"] != triton.__version__
    assert len(report["rows"]) == len(compile_report.GATE)


def test_every_chip_has_as_many_configurations():
    chips = [case.chip for case in compile_report.ALL]
    assert len(set(compile_report.ALL)) == len(chips)
    assert [chips.count(chip) for chip in compile_report.CHIPS] == [66, 101, 92, 72]  # sm_80 has no fp8
    for chip in compile_report.CHIPS:
        formats = {case.format for case in compile_report.GATE if case.chip == chip}
        assert formats == {None, *FORMATS} - ({"int8-fp8"} if chip == "sm_80" else set())


def test_limits_are_enforced():
    options = {"TQ": 128, "TK": 64, "num_warps": 8, "num_stages": 5}

    def problems(case, stack=0, shared=0, instructions=("wgmma",)):
        return compile_report.Row(case, options, 255, stack, shared, instructions).problems()

    case = compile_report.Case("sm_90", 128, "bf16")
    assert problems(case) == []
    assert problems(case, stack=32) == []
    assert problems(case, stack=40) == ["40 bytes of stack per thread, the limit is 32"]
    assert problems(compile_report.Case("sm_90", 128, "fp32"), stack=40, instructions=()) != []
    assert problems(compile_report.Case("sm_80", 64, "fp16"), stack=136) != []
    assert problems(compile_report.Case("sm_120", 64, "fp16"), shared=99 * 1024 + 1) != []
    assert problems(case, instructions=("mma.sync",)) == [
        "no wgmma in the machine code", "mma.sync in the machine code",
    ]  # fmt: skip
    assert problems(case, instructions=("mma.sync", "wgmma")) == ["mma.sync in the machine code"]
    single = compile_report.Case("sm_90", 256, "fp32")
    assert problems(single, stack=4000, instructions=()) == []
    assert problems(single) == ["wgmma in the machine code"], "they would round to TF32"
    backward = compile_report.Case("sm_90", 128, "fp32", part="dkv")
    assert problems(backward, stack=40, instructions=()) == ["40 bytes of stack per thread, the limit is 32"]
    quantized = compile_report.Case("sm_90", 128, "bf16", format="int8-fp8")
    assert problems(quantized) == ["no products of s8", "no products of e4m3"]
    fenced = compile_report.Case("sm_90", 128, "bf16", (128, 128), kernel="tma")
    row = compile_report.Row(fenced, options, 255, 40, 0, ("wgmma",), loops=(Loop(300, 12, 2, 1),))
    assert row.problems() == [
        "fences in a loop whose copies need none", "40 bytes of stack per thread, the limit is 32",
    ]  # fmt: skip
    row = compile_report.Row(case, options, 255, 0, 0, ("wgmma",), ("R1 is overwritten by MOV",), (4, 24))
    assert row.problems() == [
        "R1 is overwritten by MOV",
        "multiplications are serialised: 4 waits in PTX, 24 in the machine code",
    ]


def test_what_this_triton_cannot_multiply_by_the_newest_instructions():
    """Only then, and only integers, may be multiplied by older ones; and those have to be there."""
    lacking, none, left = (
        "this Triton has none",
        ["no tcgen05 in the machine code"],
        ["mma.sync in the machine code"],
    )
    for format, older, instructions, products, expected in (
        ("int8-int8", lacking, ("mma.sync",), ("s8",), []),
        ("int8-int8", None, ("mma.sync",), ("s8",), none + left),
        ("int8-int8", None, ("tcgen05",), ("s8",), []),
        ("int8-int8", lacking, ("mma.sync",), (), ["no products of s8"]),
        ("int8-int4", lacking, (), (), ["no mma.sync in the machine code", "no products of s8"]),
        (
            "int8-int4",
            lacking,
            ("tcgen05",),
            ("s8",),
            ["no mma.sync in the machine code", "tcgen05 in the machine code"],
        ),
        ("int8", lacking, ("mma.sync", "tcgen05"), ("s8",), []),
        ("int8", lacking, ("mma.sync",), ("s8",), none),
        ("int8", None, ("mma.sync", "tcgen05"), ("s8",), left),
        ("int8-fp8", lacking, ("mma.sync", "tcgen05"), ("s8", "e4m3"), []),
        ("int8-fp8", lacking, ("mma.sync",), ("s8", "e4m3"), none),
        (None, lacking, ("mma.sync",), (), none + left),
    ):
        case = compile_report.Case("sm_100", 64, "bf16", format=format)
        row = compile_report.Row(
            case, {"TQ": 128, "TK": 64}, 9, 0, 9, instructions, products=products, older=older
        )
        assert row.problems() == expected, (format, older, instructions)


def test_the_report_says_what_this_triton_cannot():
    case = compile_report.Case("sm_100", 64, "bf16", format="int8-int8")
    options = {"TQ": 128, "TK": 64, "num_warps": 8, "num_stages": 2}
    rows = [
        compile_report.Row(case, options, 9, 0, 9, ("mma.sync",), products=("s8",), older=older)
        for older in ("it has none", "it has none", None)
    ]
    said = (
        "On sm_100 integers of 8 bits are multiplied by mma.sync, and no limit is broken by it: it has none."
    )
    assert compile_report.notes(rows) == [said]
    assert f"\n\n{said}\n\n```" in compile_report.page("3.6", rows)
    assert "3 configurations, 1 beyond a limit" in compile_report.page("3.6", rows)


@pytest.mark.parametrize(
    "capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16", "fp32"])
def test_every_launch_has_a_configuration(capability, dtype):
    for head_dim in (1, 16, 24, 64, 72, 128, 129, 256):
        for bq in QUERY_BLOCKS:
            for bk in KEY_BLOCKS:
                options = triton_configs.config(head_dim, dtype, (bq, bk), capability)
                assert bq % options["TQ"] == 0
                assert bk % options["TK"] == 0
                assert options["num_warps"] in (4, 8)
                for part in ("dq", "dkv"):
                    asked = part, "pointer", head_dim, dtype, (bq, bk), capability
                    options = triton_configs.backward_config(*asked)
                    assert bq % options["TQ"] == 0
                    assert bk % options["TK"] == 0
                    assert options["num_warps"] in (4, 8)
                for format in FORMATS.values():
                    options = triton_configs.quantized_config(head_dim, dtype, format, (bq, bk), capability)
                    assert bq % options["TQ"] == 0
                    assert key_group(bk) % options["TK"] == 0
                    assert format.weights is None or options["TK"] == key_group(bk)


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


def test_the_backward_pass_compiles():
    """With a text length per sample: no spills, no multiplications that wait for each other."""
    for part in ("dq", "dkv"):
        row = compile_report.compile_case(compile_report.Case("sm_90", 128, "bf16", text=True, part=part))
        assert not row.problems(), row


@pytest.mark.parametrize("part", ["forward", "dq", "dkv"])
def test_tiles_of_fewer_keys_than_a_word_has_bits_do_not_compile(part):
    """Whoever launches a kernel with options of their own."""
    import triton

    case = compile_report.Case("sm_90", 64, "bf16", part=part)
    launch = compile_report.forward_launch if part == "forward" else compile_report.gradients_launch
    kernel, grid, args, options = launch(case, *compile_report.inputs_of(case), (9, 0))
    with compile_report.pretend_gpu((9, 0)), pytest.raises(triton.CompilationError) as caught:
        kernel.warmup(*args, grid=grid, **options | {"TK": 16})
    error = caught.value
    while error.__cause__ is not None:  # from the kernel down to what it calls
        error = error.__cause__
    assert "a word has the bits of 32 keys" in str(error)


@pytest.mark.parametrize("keys", [64, 128])
def test_keys_by_the_copy_engine(keys):
    """No spills and no fences in its loops, of which there are two; the kernel with pointers needs fences."""
    row = compile_report.compile_case(
        compile_report.Case("sm_90", 128, "bf16", (128, keys), text=True, kernel="tma")
    )
    assert not row.problems(), row
    assert (row.options["TQ"], row.options["TK"]) == (128, keys)
    full, partial = row.loops
    assert full.multiplications == partial.multiplications
    assert full.instructions < partial.instructions
    assert f"{full.fences}/{partial.fences}" == "0/0"


def test_warps_that_share_out_the_work():
    """No spills, no waits that were not asked for, and no barrier that all warps meet at in any loop."""
    row = compile_report.compile_case(
        compile_report.Case("sm_90", 64, "bf16", (128, 64), text=True, kernel="gluon")
    )
    assert not row.problems(), row
    assert len(row.loops) == 4, "two of each group"
    assert not any(loop.barriers for loop in row.loops)


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
    broken = compile_report.Row(case, options, 255, 4000, 1024, ("wgmma",), ("R1 is overwritten",), (4, 9))
    text = compile_report.page("3.9", [fine, broken])
    looping = compile_report.Row(
        case, options, 200, 0, 9, ("wgmma",), loops=(Loop(300, 12, 2, 1), Loop(400, 12, 3, 0))
    )
    assert "300/400     2/3      1/0     wgmma" in compile_report.line(looping)
    assert "Triton 3.9" in text
    assert "2 configurations, 1 beyond a limit; 1 with an operand overwritten too early, 1 serialised" in text
    assert text.count(compile_report.line(fine)) == 1
