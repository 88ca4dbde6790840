"""Measures this CPU for `dit-accel plan`, `min_tokens="auto"` and `summary()`: `dit-accel bench --calibrate`.

The same two measurements as the table of the library comes from, shorter: block-sparse attention against
`scaled_dot_product_attention` at several lengths (`attention.py`), and from which length on sparse attention
is faster (`overhead.py`), in float32 and bfloat16. How much faster
numbers of few bits are (`quantization.py`) is measured on two of these cases. Kernels are checked before they
are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from dit_accel.kernels import block_sparse_attention, can_run, fastest_backend, quantizations
from dit_accel.patterns import Clear, Neighborhood
from dit_accel.runtime.speed_table import AttentionCase, BreakEven, QuantizedCase, SpeedTable, this_machine

from .attention import (
    DTYPES,
    HEAD_DIM,
    HEADS,
    Case,
    Result,
    cheapest_mask,
    excess_error,
    interleaved,
    measure,
)
from .overhead import DENSITIES, EVERYTHING, SMALLEST, break_even, calls
from .quantization import LARGEST_ERROR
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
STEPS = len(DTYPES) * (len(CASES) + len(DENSITIES) + 1) + 1


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
    attention, lengths, quantized = [], [], []
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
            for case in dict.fromkeys((cases[0], cases[-1])):
                quantized += _quantized(case, dtype, repeats)
            advance()
            setting = Setting("cpu", dtype, HEADS, HEAD_DIM)
            for density in DENSITIES:
                found = break_even(density, sides, setting, timer, beside)
                if found.tokens is not None:
                    lengths.append(BreakEven(name, HEAD_DIM, density, found.tokens))
                advance()
    here = this_machine("cpu")
    return SpeedTable(here, tuple(attention), tuple(lengths), quantized=tuple(quantized))


def _timer(repeats: int, *pair: Callable) -> list[tuple[float, float, float]]:
    return interleaved(*pair, repeats)


def _quantized(case: Case, dtype: torch.dtype, repeats: int) -> Iterator[QuantizedCase]:
    """Of every format that the kernel for this CPU computes."""
    mask = cheapest_mask(case.pattern, case.layout)
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (3, 1, HEADS, mask.seq_len, HEAD_DIM)
    q, k, v = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(dtype)
    asked = {"device": "cpu", "dtype": dtype, "head_dim": HEAD_DIM, "block_size": mask.block_size}
    for format in quantizations():
        if can_run(fastest_backend("cpu"), quantization=format, **asked) is not None:
            continue
        ways = [partial(block_sparse_attention, q, k, v, mask, quantization=x) for x in (None, format)]
        error = excess_error(q, k, v, mask, ways[1](), LARGEST_ERROR)
        assert error <= 1, f"{format}: error {error:.2f} times what is allowed, not timed"
        (_, plain, _), (_, short, _) = interleaved(*ways, repeats)
        name = str(dtype).removeprefix("torch.")
        yield QuantizedCase(name, HEAD_DIM, format, mask.seq_len, mask.block_density, plain / short)


def _row(result: Result) -> AttentionCase:
    dtype, tokens = str(result.dtype).removeprefix("torch."), result.case.layout.seq_len
    return AttentionCase(dtype, HEAD_DIM, HEADS, tokens, result.block_density, result.efficiency)
