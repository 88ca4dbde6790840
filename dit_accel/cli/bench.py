"""`dit-accel bench`: block-sparse attention against dense on this CPU, or its calibration for plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import reported
from .output import JsonOption, note, print_json, print_table

if TYPE_CHECKING:
    from dit_accel.runtime.speed_table import SpeedTable

SCHEMA = "dit-accel/bench/1"
EXAMPLE = "Example: dit-accel bench --calibrate"
COLUMNS = (
    "pattern", "tokens", "dtype", "blocks", "density", "block density", "SDPA ms", "sparse ms", "speed-up",
    "speed-up x block density",
)  # fmt: skip


@reported
def bench(
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure this machine for plans, summaries and `min_tokens: auto`, and keep that.",
        ),
    ] = False,
    quantization: Annotated[
        str | None,
        typer.Option("--quantization", help="Time attention in this numeric format instead, such as int8."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time block-sparse attention against PyTorch's on this CPU; kernels are checked before they are timed.

    With --calibrate, in under two minutes, also the lengths from which sparse attention is faster, and how
    much faster numbers of few bits are; what is measured then replaces the speeds that come with the library.
    For a GPU: `make gpu-bench`.
    """
    if calibrate:
        if quantization is not None:
            raise ValueError("`--calibrate` measures all formats of this CPU; leave out `--quantization`")
        return _calibrate(json)
    return _bench(json, quantization)


def _bench(json: bool, quantization: str | None) -> None:
    import torch

    from dit_accel.environment import environment
    from dit_accel.evals.benchmarks.attention import DTYPES, cheapest_mask, measure
    from dit_accel.evals.benchmarks.calibrate import CASES
    from dit_accel.evals.benchmarks.quantization import LARGEST_ERROR
    from dit_accel.kernels import quantizations
    from dit_accel.runtime.speed_table import this_machine

    if quantization not in (None, *quantizations()):
        raise ValueError(
            f"`--quantization` must be one of {', '.join(quantizations())}, got {quantization!r}"
        )
    results, relative = [], LARGEST_ERROR if quantization else None
    with _progress("attention", len(CASES) * len(DTYPES)) as advance, torch.inference_mode():
        for case in CASES:
            mask = cheapest_mask(case.pattern, case.layout)
            for dtype in DTYPES:
                results.append(measure(case, dtype, mask, 5, quantization, relative))
                advance()
    rows = [
        {
            "pattern": result.case.name,
            "tokens": result.case.layout.seq_len,
            "dtype": str(result.dtype).removeprefix("torch."),
            "quantization": quantization,
            "block_size": result.block_size,
            "density": result.density,
            "block_density": result.block_density,
            "dense_ms": result.dense[1],
            "sparse_ms": result.sparse[1],
            "speedup": result.speedup,
            "efficiency": result.efficiency,
        }
        for result in results
    ]
    if json:
        return print_json({"schema": SCHEMA, "environment": environment(), "attention": rows})
    title = f"Attention{f' in {quantization}' if quantization else ''} on {this_machine('cpu')}"
    print_table(title, COLUMNS, [_cells(row) for row in rows])
    return None


def _cells(row: dict[str, Any]) -> list[str]:
    row = {name: value for name, value in row.items() if name != "quantization"}
    formats = {"density": ".3f", "block_density": ".3f", "dense_ms": ".2f", "sparse_ms": ".2f"}
    formats |= {"speedup": ".2f", "efficiency": ".2f"}
    blocks = "x".join(map(str, row["block_size"]))
    return [format(value, formats.get(key, "")) for key, value in (row | {"block_size": blocks}).items()]


def _calibrate(json: bool) -> None:
    from dit_accel.evals.benchmarks.calibrate import STEPS, calibrate
    from dit_accel.runtime.speed_table import calibrated_path

    with _progress("calibration", STEPS) as advance:
        table = calibrate(advance)
    path = calibrated_path(table.machine)
    table.write(path)
    if json:
        return print_json({"schema": SCHEMA, "file": path, **table.to_dict()})
    _show(table)
    note(f"kept in {path}; plan, summaries and min_tokens: auto predict from it on this machine")
    return None


def _show(table: SpeedTable) -> None:
    cases = [
        (case.dtype, case.tokens, f"{case.block_density:.3f}", f"{case.efficiency:.2f}")
        for case in table.attention
    ]
    columns = ("dtype", "tokens", "block density", "speed-up x block density")
    print_table(f"Attention on {table.machine}", columns, cases)
    lengths = [(one.dtype, one.density, f"{one.tokens:.0f}") for one in table.break_even]
    print_table("Break-even lengths", ("dtype", "density", "tokens"), lengths)
    gains = [(one.dtype, one.quantization, one.tokens, f"{one.gain:.2f}") for one in table.quantized]
    print_table("Formats", ("dtype", "format", "tokens", "times as fast as without"), gains)


@contextmanager
def _progress(label: str, steps: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; gives a function to call after each step."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=steps)
        yield lambda: progress.advance(task)


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(epilog=EXAMPLE)(bench)
