"""Hazards and waits of asynchronous multiplications: by hand, and in real machine code that is changed."""

import dataclasses

import pytest

from dit_accel.evals.benchmarks import compile_report, machine_code
from dit_accel.evals.benchmarks.machine_code import Loop, loops, overwritten_operands, parse, waits
from dit_accel.kernels.block_sparse import triton_configs

USE = "HGMMA.64x64x16.F32.BF16 R24, R120, gdesc[UR4].tnspB, R24"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def code(*lines: str) -> list[machine_code.Instruction]:
    """Instructions at addresses 0x1000, 0x1010, ..., written as cuobjdump writes them."""
    return parse("\n".join(
        f"        /*{0x1000 + 16 * number:04x}*/                   {line} ;   /* 0x00000000000079c5 */"
        for number, line in enumerate(lines)
    ))  # fmt: skip


def test_instructions_are_read():
    first, second = code("@!P0 IMAD.WIDE.U32 R4, R2.reuse, 0x10, R6", "EXIT")
    assert (first.address, first.predicate, first.opcode) == (0x1000, "@!P0", "IMAD.WIDE.U32")
    assert list(first.results()) == [4, 5]
    assert (second.address, second.opcode, second.operands) == (0x1010, "EXIT", "")


@pytest.mark.parametrize(
    ("line", "registers"),
    [
        ("FADD R121, R1, R2", [121]),
        ("LDS.128 R120, [R3+0x10]", [120, 121, 122, 123]),
        ("LDG.E.64 R122, desc[UR6][R2.64]", [122, 123]),
        ("LDSM.16.MT88.4 R117, [R3]", [117, 118, 119, 120]),
        ("CS2R R122, SRZ", [122, 123]),
        ("CS2R.32 R122, SR_CLOCKLO", [122]),
        ("SHFL.BFLY PT, R123, R100, 0x1, 0x1f", [123]),
        ("LOP3.LUT P0, R120, R3, 0x1, RZ, 0xc0, !PT", [120]),
        ("F2FP.BF16.F32.PACK_AB R122, R5, R6", [122]),
        ("HMMA.16816.F32.BF16 R120, R4, R8, R120", [120, 121, 122, 123]),
        ("STS.128 [R120], R4", []),
        ("ISETP.GE.AND P0, PT, R120, R3, PT", []),
        ("LDGSTS.E.BYPASS.128 [R120], desc[UR6][R2.64]", []),
        ("R2UR UR4, R120", []),
        ("LOP3.LUT P0, RZ, R120, 0x1, RZ, 0xc0, !PT", []),
    ],
)
def test_what_an_instruction_writes_to(line, registers):
    assert list(code(line)[0].results()) == registers


class TestOverwrittenOperands:
    @pytest.mark.parametrize("write", ["MOV R120, R1", "@P3 MOV R123, R1", "LDS.128 R117, [R2]"])
    def test_before_the_wait(self, write):
        (found,) = overwritten_operands(code(f"{USE}, gsb0", write, WAIT, "EXIT"))
        assert "0x1000: HGMMA" in found
        assert write.split(" R1")[0].split()[-1] in found

    @pytest.mark.parametrize("harmless", ["MOV R119, R1", "MOV R124, R120", "STS.128 [R120], R4", "NOP"])
    def test_not_by_what_does_not_write_there(self, harmless):
        assert overwritten_operands(code(f"{USE}, gsb0", harmless, WAIT, "EXIT")) == []

    def test_not_behind_the_wait(self):
        assert overwritten_operands(code(f"{USE}, gsb0", WAIT, "MOV R120, R1", "EXIT")) == []

    def test_a_wait_that_leaves_the_group_in_flight_does_not_count(self):
        later = "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR4], R88, gsb0"
        leave_one = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
        assert len(overwritten_operands(code(f"{USE}, gsb0", leave_one, "MOV R120, R1", WAIT, "EXIT"))) == 1
        assert (
            overwritten_operands(code(f"{USE}, gsb0", later, leave_one, "MOV R120, R1", WAIT, "EXIT")) == []
        )

    def test_a_group_is_committed_by_its_last_multiplication(self):
        group = (USE, f"{USE.replace('R120', 'R124')}, gsb0")
        assert overwritten_operands(code(*group, WAIT, "MOV R120, R1", "EXIT")) == []
        assert len(overwritten_operands(code(*group, "MOV R120, R1", WAIT, "EXIT"))) == 1
        assert len(overwritten_operands(code(group[0], WAIT, "MOV R120, R1", group[1], WAIT, "EXIT"))) == 1

    def test_round_a_loop(self):
        loop = ("NOP", "MOV R120, R1", WAIT, f"{USE}, gsb0", "@P0 BRA 0x1000", WAIT, "EXIT")
        assert len(overwritten_operands(code(*loop))) == 1
        assert overwritten_operands(code("NOP", WAIT, "MOV R120, R1", *loop[3:])) == []

    def test_on_either_side_of_a_branch(self):
        taken = code(f"{USE}, gsb0", "@P0 BRA 0x1040", WAIT, "EXIT", "MOV R120, R1", "EXIT")
        assert len(overwritten_operands(taken)) == 1
        never = code(f"{USE}, gsb0", "BRA 0x1030", "MOV R120, R1", WAIT, "EXIT")
        assert overwritten_operands(never) == []

    def test_operands_in_shared_memory_are_no_concern(self):
        both_shared = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
        assert overwritten_operands(code(both_shared, "MOV R120, R1", WAIT, "EXIT")) == []


def test_waits():
    assert waits(code(f"{USE}, gsb0", WAIT, "WARPGROUP.ARRIVE", WAIT, "EXIT")) == 2
    assert (
        machine_code.waits_asked_for("wgmma.wait_group.sync.aligned 0;\nwgmma.wait_group.sync.aligned 1;")
        == 2
    )


# -- in what the compiler makes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel():
    kernel = pytest.importorskip(
        "dit_accel.kernels.block_sparse.triton_forward", reason="Triton is not installed"
    )
    if kernel.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: nothing compiles")
    return kernel


@pytest.fixture
def compiled(kernel, monkeypatch):
    """The kernel's machine code for Hopper, as the report reads it, and its row in the report."""
    seen = []
    monkeypatch.setattr(compile_report, "parse", lambda sass: seen.append(parse(sass)) or seen[-1])
    row = compile_report.compile_case(compile_report.Case("sm_90", 64, "bf16"))
    return seen[-1], row


def test_every_multiplication_of_probabilities_and_values_is_looked_at(compiled):
    """Each of them, made to meet a write to one of its registers, is found."""
    instructions, row = compiled
    assert row.overwritten == ()
    targets = [
        index for index, instruction in enumerate(instructions)
        if machine_code._LEFT_IN_REGISTERS.search(instruction.operands)
    ]  # fmt: skip
    assert len(targets) == 8  # 64 keys in steps of 16, in the loops over full and over partial blocks
    for index in targets:
        first = int(machine_code._LEFT_IN_REGISTERS.search(instructions[index].operands)[1])
        after = instructions[index + 1]
        damaged = list(instructions)
        damaged[index + 1] = dataclasses.replace(after, opcode="MOV", operands=f"R{first + 3}, RZ")
        found = overwritten_operands(damaged)
        assert any(text.startswith(str(instructions[index])) for text in found)


def test_serialised_multiplications_are_told_apart(kernel, compiled, monkeypatch):
    """Too few registers make ptxas wait after each multiplication."""
    assert compiled[1].waits == (4, 4)
    plain = triton_configs.config
    monkeypatch.setattr(triton_configs, "config", lambda *inputs: plain(*inputs) | {"maxnreg": 128})
    row = compile_report.compile_case(compile_report.Case("sm_90", 128, "bf16"))
    assert row.waits[0] == 4
    assert row.waits[1] > 4
    assert any("multiplications are serialised: 4 waits in PTX" in problem for problem in row.problems())


class TestLoops:
    def test_of_multiplications_alone(self):
        instructions = code(
            "FADD R1, R1, R1", "@P0 BRA 0x1000",  # nothing is multiplied
            f"{USE}, gsb0", "BAR.SYNC.DEFER_BLOCKING 0x0", "BAR.SYNC.DEFER_BLOCKING 0x1, 0x80",
            "FENCE.VIEW.ASYNC", "@P0 BRA 0x1020", "EXIT",
        )  # fmt: skip
        assert loops(instructions) == [Loop(instructions=5, multiplications=1, barriers=1, fences=1)]

    def test_the_innermost(self):
        instructions = code(f"{USE}, gsb0", USE, "@P0 BRA 0x1010", "@P1 BRA 0x1000", "EXIT")
        assert loops(instructions) == [Loop(2, 1, 0, 0)]

    def test_a_way_back_from_behind_the_end_is_none(self):
        assert loops(code(f"{USE}, gsb0", "EXIT", "NANOSLEEP", "BRA 0x1000")) == []
