"""Measures this CPU for `dit-accel plan`, `min_tokens="auto"` and `summary()`: `dit-accel bench --calibrate`.

The same two measurements as the table of the library comes from, shorter: block-sparse attention against
`scaled_dot_product_attention` at several lengths (`attention.py`), and from which length on sparse attention
is faster (`overhead.py`), in float32 and bfloat16. Kernels are checked before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from dit_accel.patterns import Clear, Neighborhood
from dit_accel.runtime.speed_table import AttentionCase, BreakEven, SpeedTable, this_machine

from .attention import DTYPES, HEAD_DIM, HEADS, Case, Result, cheapest_mask, interleaved, measure
from .overhead import DENSITIES, EVERYTHING, SMALLEST, break_even, calls
from .scaling import Setting

CASES = (
    Case(0.1, Clear(9), (1, 32, 64)),
    Case(0.25, Clear(15), (1, 32, 64)),
    Case(0.25, Clear(21), (1, 64, 64)),
    Case(0.5, Neighborhood(45), (1, 64, 64)),
    Case(0.1, Clear(18), (1, 64, 128)),
    Case(0.25, Neighborhood(45), (1, 64, 128)),
)
SIDES = (8, 12, 16, 24, 32, 48)  # of square images in tokens
STEPS = len(DTYPES) * (len(CASES) + len(DENSITIES)) + 1


def calibrate(
    advance: Callable[[], object] = lambda: None,
    *,
    cases: Sequence[Case] = CASES,
    sides: Sequence[int] = SIDES,
    repeats: int = 5,
    repeats_short: int = 15,
) -> SpeedTable:
    """The speed table of this CPU with the present number of threads; writes nothing.

    Args:
        advance: called after each of `STEPS` steps.
        cases: of attention.
        sides: of square images in tokens, between which break-even lengths are sought.
        repeats: timed calls of each kind of attention.
        repeats_short: the same at break-even lengths, where calls take milliseconds.

    Raises:
        AssertionError: a kernel that computes something else.
    """
    timer = partial(_timer, repeats_short)
    attention, lengths = [], []
    with torch.inference_mode():
        beside = calls(EVERYTHING, SMALLEST, timer).per_layer
        advance()
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            for case in cases:
                attention.append(
                    _row(measure(case, dtype, cheapest_mask(case.pattern, case.layout), repeats))
                )
                advance()
            setting = Setting("cpu", dtype, HEADS, HEAD_DIM)
            for density in DENSITIES:
                found = break_even(density, sides, setting, timer, beside)
                if found.tokens is not None:
                    lengths.append(BreakEven(name, HEAD_DIM, density, found.tokens))
                advance()
    return SpeedTable(this_machine("cpu"), tuple(attention), tuple(lengths))


def _timer(repeats: int, *pair: Callable) -> list[tuple[float, float, float]]:
    return interleaved(*pair, repeats)


def _row(result: Result) -> AttentionCase:
    dtype, tokens = str(result.dtype).removeprefix("torch."), result.case.layout.seq_len
    return AttentionCase(dtype, HEAD_DIM, HEADS, tokens, result.block_density, result.efficiency)
