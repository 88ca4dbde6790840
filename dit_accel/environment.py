"""What a result was measured on: versions, hardware, commit."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("dit-accel", "torch", "triton", "diffusers", "transformers", "accelerate", "xformers", "numpy")


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name as Linux knows it; elsewhere what Python knows."""
    return _of_processor("model name") or platform.processor() or platform.machine()


def instruction_set() -> str:
    """The widest instruction set for vectors or matrices that this CPU has, as Linux knows it, or empty."""
    flags = _of_processor("flags").split()
    known = {"amx_bf16": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
    return next((name for flag, name in known.items() if flag in flags), "")


def _of_processor(key: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _commit() -> str | None:
    """The commit of the checkout this package runs from, marked `-dirty` if changed; None elsewhere."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def environment() -> dict[str, Any]:
    """Versions and hardware, in JSON's terms."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _package(name) for name in PACKAGES},
        "commit": _commit(),
        "cpu": {
            "name": processor(),
            "instructions": instruction_set(),
            "cores": cores,
            "torch_threads": torch.get_num_threads(),
        },
        "cuda": torch.version.cuda,
        "gpus": [
            {
                "name": gpu.name,
                "capability": f"{gpu.major}.{gpu.minor}",
                "memory_gib": round(gpu.total_memory / 2**30, 1),
            }
            for gpu in gpus
        ],
    }


def command_line() -> str:
    """The command that runs now, ready to paste."""
    return shlex.join(["dit-accel", *sys.argv[1:]])
