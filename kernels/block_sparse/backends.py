"""The registry of backends and what follows from it: what can run, why not, and what `"auto"` takes.

To add a backend, write a module with a `BACKEND` and list it in `BACKENDS`.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

from dit_accel.errors import UnavailableError

from . import fa4, flex, gather, gluon, native, reference, tma, triton
from .problem import Backend, Problem

BACKENDS: tuple[Backend, ...] = (  # `"auto"` takes the first that suits the device and can run
    triton.BACKEND,
    tma.BACKEND,
    gluon.BACKEND,
    native.BACKEND,
    gather.BACKEND,
    flex.BACKEND,
    fa4.BACKEND,
    reference.BACKEND,
)

_log = logging.getLogger("dit_accel")


def choose(name: str, problem: Problem) -> tuple[Backend | None, list[str]]:
    """The backend that `name` or `"auto"` stands for if it can run, and why none that comes before it can.

    Raises:
        ValueError: an unknown backend.
    """
    reasons = []
    for backend in automatic(problem.device.type) if name == "auto" else [named(name)]:
        reason = backend.reason(problem)
        if reason is None:
            return backend, reasons
        reasons.append(reason)
    return None, reasons


def named(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    names = ", ".join(repr(known) for known in ("auto", *(backend.name for backend in BACKENDS)))
    raise ValueError(f"`backend` must be one of {names}, got {name!r}")


def automatic(device_type: str) -> list[Backend]:
    """The backends that `"auto"` considers on a type of device, in the order of its preference."""
    return [b for b in BACKENDS if b.automatic_on is None or device_type in b.automatic_on]


# -- questions ----------------------------------------------------------------------------------------------


def can_run(backend: str, **inputs: Any) -> str | None:
    """Why `backend` (or `"auto"`) cannot run with such inputs, or None if it can.

    Args:
        backend: the name of one, or `"auto"`.
        inputs: the attributes of a `Problem`: `device`, `dtype`, `head_dim`, `block_size` and, where they
            matter, `quantization`, `return_lse`, `requires_grad`, `tail`.

    Raises:
        ValueError: an unknown backend.
        TypeError: inputs that are missing, or that no problem has.
    """
    chosen, reasons = choose(backend, Problem(**inputs))
    return None if chosen else joined(reasons)


def quantizations() -> tuple[str, ...]:
    """The numeric formats that some backend computes: values of `quantization` beside None."""
    return tuple(dict.fromkeys(name for backend in BACKENDS for name in backend.formats))


def joined(reasons: list[str]) -> str:
    """Reasons of several backends as one text, each once."""
    return "; ".join(dict.fromkeys(reasons))


def automatic_backend(
    device: torch.device | str, dtype: torch.dtype, **inputs: Any
) -> tuple[str, str | None]:
    """The backend that `"auto"` stands for with such inputs (as for `can_run`), and why it is none better.

    Raises:
        UnavailableError: none can run.
    """
    chosen, reasons = choose("auto", Problem(device, dtype, **inputs))
    if chosen is None:
        raise UnavailableError(f"no backend can run here: {joined(reasons)}")
    return chosen.name, reasons[0] if reasons else None


def fastest_backend(device: torch.device | str) -> str:
    """The fastest backend of a device type, which `"auto"` takes where it can run."""
    return automatic(torch.device(device).type)[0].name


def block_sizes(device: torch.device | str) -> dict[tuple[int, int], float]:
    """Block sizes worth trying on a device, the default first, with the relative time of a computed pair.

    They are those of the backend that `"auto"` takes there.
    """
    device = torch.device(device)
    for backend in automatic(device.type):
        sizes = backend.block_sizes(device)
        if backend.reason(Problem(device, torch.float32, 64, next(iter(sizes)))) is None:
            break
    return sizes


def default_block_size(device: torch.device | str) -> tuple[int, int]:
    """The (query, key) block size that suits the automatic backend of a device whatever the mask."""
    return next(iter(block_sizes(device)))


def support_table(head_dim: int = 64, block_size: tuple[int, int] | None = None) -> list[dict[str, str]]:
    """What runs on this machine: per backend, device and dtype a `status`, "yes" or the reason why not.

    `gradients` says the same of calls that need them.
    """
    rows = []
    for backend in BACKENDS:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                size = block_size or default_block_size(device)
                row = {"backend": backend.name, "device": device, "dtype": str(dtype).removeprefix("torch.")}
                for name, needed in (("status", False), ("gradients", True)):
                    problem = Problem(device, dtype, head_dim, size, requires_grad=needed)
                    row[name] = backend.reason(problem) or "yes"
                rows.append(row)
    return rows


@cache  # once per device type, dtype and reason
def log_choice(chosen: str, device: str, dtype: torch.dtype, reason: str | None) -> None:
    """Say which backend `"auto"` took: a warning with the reason where a faster one cannot run."""
    if reason is None:
        _log.info("block_sparse_attention on %s, %s: backend %r", device, dtype, chosen)
    else:
        best = fastest_backend(device)
        text = "block_sparse_attention on %s, %s: backend %r, which is slower than %r: %s"
        _log.warning(text, device, dtype, chosen, best, reason)
