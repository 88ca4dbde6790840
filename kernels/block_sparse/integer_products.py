"""Where Triton multiplies integers of eight bits by older instructions than a GPU has."""

from __future__ import annotations

import logging
from functools import cache

from .triton_configs import Gpu, chip

_log = logging.getLogger("dit_accel")
FIRST = (3, 8)  # Triton 3.6 and 3.7 have no tcgen05.mma of integers; PTX has, as kind::i8
CAPABILITY = (10, 0)  # where later ones use it: for 10.3 and 11.0, Triton 3.9 does not


def older_instructions(gpu: Gpu, triton: str) -> str | None:
    """Why this Triton multiplies integers on a GPU by `mma.sync` while 16 bits take `tcgen05`, or None.

    Nothing else is to be had: `tl.dot` chooses, and codes turned into 16 bits would be multiplied no faster
    than 16 bits are, after more work.
    """
    if isinstance(gpu, str) or chip(gpu) != "sm_100":
        return None
    if tuple(map(int, triton.split(".")[:2])) < FIRST:
        least = ".".join(map(str, FIRST))
        return f"Triton {triton} has no tcgen05 instruction for integers of 8 bits, {least} and newer have"
    if gpu != CAPABILITY:
        return (
            f"Triton {triton} has tcgen05 instructions for integers of 8 bits on compute capability "
            f"{CAPABILITY[0]}.{CAPABILITY[1]} alone, got {gpu[0]}.{gpu[1]}"
        )
    return None


@cache  # once per GPU
def warn_of_older_instructions(gpu: Gpu, triton: str) -> None:
    """Says why quantized attention may be slower than that in 16 bits on a GPU, if Triton is the reason."""
    reason = older_instructions(gpu, triton)
    if reason is not None:
        _log.warning("quantized attention may be slower here than that in 16 bits: %s", reason)
