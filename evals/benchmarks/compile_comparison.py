"""The Triton kernels' machine code side by side, the one with pointers before those that came after it.

    python -m dit_accel.evals.benchmarks.compile_report --json report.json
    python -m dit_accel.evals.benchmarks.compile_comparison report.json

Of what `compile_report` wrote, the configurations that its limits hold for are put into one table by chip,
pass and head_dim. Nothing is compiled or run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .compile_cases import CHIPS, GATE, KERNELS, PARTS, Case
from .machine_code import Loop, per_turn
from .table import RESULTS, markdown

HEADINGS = ("chip", "pass", "head_dim", "kernel", "blocks", "rows x keys", "warps / stages", "registers",
            "stack", "shared bytes", "instructions for 64 keys", "CTA-wide barriers", "fences",
            "waits")  # fmt: skip
NAMES = {"pointer": "pointers", "tma": "TMA", "gluon": "Gluon"}
FORMATS = (None, "int8", "int8-fp8")  # the others are computed by the kernel with pointers alone
PASSES = {"forward": "forward", "dq": "dQ", "dkv": "dK, dV"}


def compared(rows: list[dict[str, Any]]) -> list[tuple[Case, dict[str, Any]]]:
    """The gated rows of a report with 16-bit inputs, those to be compared next to each other.

    Of a configuration with and without text lengths the one with them stands for both; formats that the
    kernel with pointers alone computes have nothing beside them and are left out.
    """
    cases = [(Case(**row["case"] | {"block_size": tuple(row["case"]["block_size"])}), row) for row in rows]
    chosen = [
        (case, row)
        for case, row in cases
        if case in GATE
        and case.dtype == "bf16"
        and case.format in FORMATS
        and (case.text or case.format is not None)
    ]
    orders = (list(CHIPS), list(PARTS), FORMATS, list(KERNELS))

    def place(found: tuple[Case, dict[str, Any]]) -> tuple:
        case, _ = found
        values = (case.chip, case.part, case.format, case.kernel)
        chip, part, format, kernel = (order.index(v) for order, v in zip(orders, values, strict=True))
        return chip, part, format, case.head_dim, kernel, case.block_size, case.ping_pong

    return sorted(chosen, key=place)


def cells(case: Case, row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    options = row["options"]
    turns = per_turn((Loop(**loop) for loop in row["loops"]), options["TK"])

    def divided(values: list[int]) -> str:
        return " / ".join(map(str, values))

    return [
        case.chip,
        PASSES[case.part] + (f", {case.format}" if case.format else ""),
        str(case.head_dim),
        NAMES[case.kernel] + (" ping-pong" if case.ping_pong else ""),
        "x".join(map(str, case.block_size)),
        f"{options['TQ']}x{options['TK']}",
        f"{options['num_warps']} / {options['num_stages']}",
        str(row["registers"]),
        str(row["stack"]),
        str(row["shared"]),
        divided(turns["per 64 keys"]),
        divided(turns["barriers"]),
        divided(turns["fences"]),
        str(row["waits"][1]),
    ]


def page(report: dict[str, Any]) -> str:
    """The comparison as Markdown, of what `compile_report --json` wrote."""
    found = compared(report["rows"])
    beyond = sum(bool(row["problems"]) for _, row in found)
    return (
        "# What the Triton kernels compile to, before and after\n\n"
        f"Triton {report['triton']}, bf16 inputs, compiled without a GPU by `python -m "
        "dit_accel.evals.benchmarks.compile_report` and put together by `python -m "
        f"dit_accel.evals.benchmarks.compile_comparison`: {len(found)} configurations, {beyond} beyond a "
        "limit. **Before** is the kernel with pointers, which every chip had alone and has still until "
        "another was measured to be faster; **after** are the rows of TMA and Gluon below it. A `/` "
        "divides the loop over full blocks from that over partial ones, and in Gluon those of the two "
        "groups of warps where they differ. Instructions are those of one warp for one turn of the loop "
        "as it has 64 keys: a turn of dQ and dK, dV is one tile. `waits` are for multiplications in the "
        "whole program. Nothing here was run, and nothing says how fast a kernel is.\n\n"
        + markdown(HEADINGS, (cells(*one) for one in found))
    )


def main(arguments: list[str] | None = None) -> int:
    """Writes the comparison of a report."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.benchmarks.compile_comparison", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("report", type=Path, help="what `compile_report --json` wrote")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "compile_report_before_after.md")
    options = parser.parse_args(arguments)
    try:
        report = json.loads(options.report.read_text())
        text = page(report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{options.report} is not what `compile_report --json` writes: {error!r}")
    options.markdown.write_text(text)
    print(options.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
