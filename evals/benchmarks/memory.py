"""The peak memory of a piece of work.

On a GPU it is the most that PyTorch held in tensors. On a CPU it is the process's largest resident set, as
Linux counts it: before the work, memory that is free goes back to the system and the count starts anew
(`/proc/self/clear_refs`), so that nothing of earlier work is in it but what is still in use. Both include the
model's weights, a resident set also the program itself.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # see proc(5)


def reset(device: torch.device) -> str | None:
    """Starts counting anew; returns why that cannot be done here, None if it was."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text(RESET_PEAK)
    except (OSError, AttributeError, TypeError) as error:  # another system or C library
        return f"the peak of one run's memory on a CPU is read from Linux with glibc: {error}"
    return None


def describe(device: torch.device) -> str:
    """What `watch` gives, in words, or why it gives nothing."""
    what = "PyTorch's tensors" if device.type == "cuda" else "the process's resident set, program included"
    return reset(device) or f"peak of {what}, from switching on to the end of a run"


def peak(device: torch.device) -> int:
    """Bytes at the peak since `reset`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(re.findall(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[0]) * 1024


def watch(work: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """What `work` returns, and its peak in bytes; None where `reset` cannot be done."""
    unavailable = reset(device)
    result = work()
    return result, None if unavailable else peak(device)
