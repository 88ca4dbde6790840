"""How long a GPU takes for a call, whatever the CPU takes to launch it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SECONDS, MOST = 0.6, 20  # how long a measurement should take, and how many calls are enough
L2_BYTES = 2**28  # more than any cache
CYCLES_PER_CALL = 1_000_000  # about half a millisecond: longer than Python takes to launch a call


@dataclass(frozen=True)
class Timed:
    """The 20%, 50% and 80% quantiles in milliseconds, of how many calls, and the clock meanwhile in MHz."""

    p20: float
    ms: float
    p80: float
    repeats: int
    clock: int | None = None

    def as_row(self) -> dict[str, Any]:
        return {"ms": self.ms, "p20": self.p20, "p80": self.p80, "repeats": self.repeats, "clock": self.clock}


def measure(call: Callable[[], object], device: str) -> Timed:
    """Times a call that has been made before, so that all is compiled."""
    return _on_gpu(call) if device == "cuda" else _on_cpu(call)


def _on_gpu(call: Callable[[], object]) -> Timed:
    """Calls queue up behind a kernel that waits; each finds a cold L2 cache, between two events."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = _repeats(time.perf_counter() - start)
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda._sleep(CYCLES_PER_CALL * repeats)
    for before, after in pairs:
        flush.zero_()
        before.record()
        call()
        after.record()
    clock = _clock()
    torch.cuda.synchronize()
    return _quantiles([before.elapsed_time(after) for before, after in pairs], clock)


def _on_cpu(call: Callable[[], object]) -> Timed:
    start = time.perf_counter()
    call()
    return _quantiles([(time.perf_counter() - start) * 1e3])


def _repeats(seconds: float) -> int:
    return int(min(max(SECONDS / seconds, 1), MOST))


def _quantiles(taken: list[float], clock: int | None = None) -> Timed:
    low, middle, high = torch.tensor(taken, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Timed(float(low), float(middle), float(high), len(taken), clock)


def _clock() -> int | None:
    """The clock of the multiprocessors in MHz; None where NVML or its bindings for Python do not tell."""
    try:
        return torch.cuda.clock_rate()
    except Exception:  # NVML's errors are of classes that only its bindings have; a time is worth more
        return None
