"""Reads what asynchronous matrix multiplications of Hopper became in machine code (SASS): hazards and waits.

A `wgmma` reads its left operand from registers while the program goes on; nobody may write to those registers
until a wait covers the group it was committed with. Compilers have got this wrong (Triton PR 11781: ptxas
12.9; flash-linear-attention PR 1262: ptxas 12.8), and then results are wrong now and then. They may also give
up overlap altogether and wait after every multiplication (ptxas warnings C7510 to C7516), which costs time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE
)
_REGISTER = re.compile(r"R(\d+)\b")
_PREDICATE = re.compile(r"!?U?P(\d+|T|R)\b")
_LEFT_IN_REGISTERS = re.compile(r"R\d+, R(\d+)(?:\.\w+)*, gdesc")
_GROUPS_LEFT = re.compile(r"gsb0, (0x[0-9a-f]+)")
_ADDRESS = re.compile(r"\b0x[0-9a-f]+")
LEFT_REGISTERS = 4  # per thread: 64 rows of 32 bytes over 128 threads
MOST_GROUPS = 8  # more are never in flight
NO_RESULT = (  # opcodes whose first register is read
    "ST", "RED", "BRA", "BRX", "CALL", "RET", "EXIT", "BAR", "MEMBAR", "FENCE", "WARPGROUP", "WARPSYNC",
    "DEPBAR", "LDGDEPBAR", "LDGSTS", "UTMA", "UBLK", "SYNCS", "ISETP", "FSETP", "DSETP", "HSETP", "UISETP",
    "PLOP", "FCHK", "R2P", "R2UR", "NOP", "BSSY", "BSYNC", "CCTL", "ERRBAR", "YIELD", "NANOSLEEP",
)  # fmt: skip
_MULTIPLIES = re.compile(r"[HIQ]G?MMA|UTC\w*MMA")
FENCES = ("FENCE", "MEMBAR")
MULTIPLICATIONS = ("HGMMA", "QGMMA", "IGMMA")  # in the order of the program, so that none overtakes another


@dataclass(frozen=True)
class Instruction:
    """One line of machine code: address in bytes, predicate (or ""), opcode with its suffixes, operands."""

    address: int
    predicate: str
    opcode: str
    operands: str

    def __str__(self) -> str:
        return f"{self.address:#x}: {self.predicate} {self.opcode} {self.operands}".replace("  ", " ").strip()

    def results(self) -> range:
        """The general registers it writes to; those of the multiplications themselves are left out."""
        if self.opcode.startswith((*NO_RESULT, *MULTIPLICATIONS)):
            return range(0)
        operands = [operand.strip() for operand in self.operands.split(",")]
        named = next((operand for operand in operands if not _PREDICATE.fullmatch(operand)), "")
        register = _REGISTER.match(named)
        return range(int(register[1]), int(register[1]) + self._width()) if register else range(0)

    def _width(self) -> int:
        """How many registers a result takes."""
        kind, *suffixes = self.opcode.split(".")
        if kind == "LDSM":
            return next((int(suffix) for suffix in suffixes if suffix in ("2", "4")), 1)
        if "128" in suffixes:
            return 4
        wide = {"64", "WIDE", "F64"} & set(suffixes) or kind in ("DADD", "DMUL", "DFMA", "HMMA", "IMMA")
        if kind == "CS2R":
            wide = "32" not in suffixes
        return (4 if kind in ("HMMA", "IMMA") else 2) if wide else 1


def parse(sass: str) -> list[Instruction]:
    """The instructions of one kernel in `cuobjdump -sass` output, in order."""
    return [
        Instruction(int(address, 16), predicate, opcode, operands.strip())
        for address, predicate, opcode, operands in _INSTRUCTION.findall(sass)
    ]


def overwritten_operands(instructions: list[Instruction]) -> list[str]:
    """Writes to the left operand of a multiplication that may still be reading it, in words; none is right.

    Follows every path from each multiplication to a wait that covers it.
    """
    place = {instruction.address: index for index, instruction in enumerate(instructions)}
    after = [_successors(index, instruction, place) for index, instruction in enumerate(instructions)]
    found = []
    for start, multiplication in enumerate(instructions):
        left = _LEFT_IN_REGISTERS.search(multiplication.operands)
        if not multiplication.opcode.startswith(MULTIPLICATIONS) or not left:
            continue
        registers = set(range(int(left[1]), int(left[1]) + LEFT_REGISTERS))
        committed = int(_commits(multiplication))
        todo = [(index, committed) for index in after[start] if index < len(instructions)]
        seen = set(todo)
        while todo:
            index, committed = todo.pop()
            instruction = instructions[index]
            if not registers.isdisjoint(instruction.results()):
                found.append(f"{multiplication} is overwritten before its wait by {instruction}")
                break
            if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
                if committed > int(_GROUPS_LEFT.findall(instruction.operands)[0], 16):
                    continue
            elif _commits(instruction):
                committed = min(committed + 1, MOST_GROUPS)
            new = {
                (following, committed) for following in after[index] if following < len(instructions)
            } - seen
            seen |= new
            todo += new
    return found


def waits(instructions: list[Instruction]) -> int:
    """How often machine code waits for multiplications; as often as its PTX, unless it serialises them."""
    return sum(instruction.opcode.startswith("WARPGROUP.DEPBAR") for instruction in instructions)


def waits_asked_for(ptx: str) -> int:
    """How often PTX waits for multiplications."""
    return ptx.count("wgmma.wait_group")


@dataclass(frozen=True)
class Loop:
    """An innermost loop that multiplies matrices: what one turn of it has.

    Attributes:
        instructions: how many; each is issued by every warp.
        multiplications: of them, on tensor cores.
        barriers: at which all warps of a program meet.
        fences: between writes by threads and reads by the tensor cores, or of memory.
    """

    instructions: int
    multiplications: int
    barriers: int
    fences: int


def per_turn(found: Iterable[Loop], keys: int) -> dict[str, list[int]]:
    """Columns of a report: of each loop that differs, the shorter first, as turns are of so many keys."""
    turns = sorted(set(found), key=lambda loop: loop.instructions)  # over full blocks, then partial ones
    return {
        "per 64 keys": [round(loop.instructions * 64 / keys) for loop in turns],
        "barriers": [loop.barriers for loop in turns],
        "fences": [loop.fences for loop in turns],
    }


def loops(instructions: list[Instruction]) -> list[Loop]:
    """The innermost loops that multiply matrices, in the order of the program.

    A branch back from code that was put behind the program's end, such as a long wait, is none.
    """
    bounds = set()
    for instruction in instructions:
        if instruction.opcode.startswith("BRA"):
            target = int(_ADDRESS.findall(instruction.operands)[-1], 16)
            if target < instruction.address:
                bounds.add((target, instruction.address))
    innermost: list[tuple[int, int]] = []
    found = {}
    for first, last in sorted(bounds, key=lambda ends: ends[1] - ends[0]):
        body = [i for i in instructions if first <= i.address <= last]
        apart = all(last < other[0] or other[1] < first for other in innermost)
        ends = any(i.opcode == "EXIT" and not i.predicate for i in body)
        if apart and not ends and any(map(_multiplies, body)):
            innermost.append((first, last))
            found[first] = Loop(
                len(body),
                sum(map(_multiplies, body)),
                sum(map(_is_barrier, body)),
                sum(i.opcode.startswith(FENCES) for i in body),
            )
    return [found[first] for first in sorted(found)]


def _multiplies(instruction: Instruction) -> bool:
    return bool(_MULTIPLIES.match(instruction.opcode))


def _is_barrier(instruction: Instruction) -> bool:
    """Whether all warps of a program meet here: one that names how many threads is for some of them."""
    return instruction.opcode.startswith("BAR.SYNC") and instruction.operands.count(",") == 0


def _commits(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(MULTIPLICATIONS) and "gsb0" in instruction.operands


def _successors(index: int, instruction: Instruction, place: dict[int, int]) -> list[int]:
    """Where the program may go on: at the next instruction, at a branch's target, or at both."""
    if instruction.opcode.startswith("EXIT") and not instruction.predicate:
        return []
    if not instruction.opcode.startswith("BRA"):
        return [index + 1]
    target = _ADDRESS.findall(instruction.operands)
    conditional = instruction.predicate or len(instruction.operands.split(",")) > 1
    return [place[int(target[-1], 16)], *([index + 1] if conditional else [])]
