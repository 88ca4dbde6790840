"""Why the kernel is as fast as it is, and whether it races: NVIDIA's own tools, where they are installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import worker
from .job import Job, Row


@dataclass(frozen=True)
class Tool:
    """A program that runs another and reports on it."""

    name: str
    program: str
    options: tuple[str, ...]


COUNTERS = Tool(
    "counters", "ncu",
    ("--clock-control", "none", "--set", "full", "--kernel-name", "regex:_forward", "--launch-count", "1"),
)  # fmt: skip
MEMORY = Tool("memory", "compute-sanitizer", ("--tool", "memcheck"))
RACES = Tool("races", "compute-sanitizer", ("--tool", "racecheck"))


def run(tool: Tool, job: Job, device: str, limit: float, out: Path) -> Row:
    """A worker does a job under a tool, whose report goes to a file of `out`."""
    program = shutil.which(tool.program)
    if program is None:
        return {"kind": "left out", "reason": f"{tool.program} is not installed"}
    path = out / f"profile_{tool.name}.txt"
    work = [sys.executable, "-m", worker.__name__, "--device", device, "--job", job.to_json()]
    with path.open("w") as file:
        process = subprocess.Popen(
            [program, *tool.options, *work], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return {"kind": "left out", "reason": f"{tool.program} had not ended after {limit:.0f} s"}
    return {"kind": "profile", "tool": tool.name, "file": path.name, "exit_code": code}
