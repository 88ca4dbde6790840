"""The process that touches the GPU: does jobs, one after the other, and answers with their rows.

    python -m dit_accel.evals.gpu_bench.worker --device cuda --job JSON

does one job and ends; profilers start it so. An error of a job is a row. After an error of the GPU itself
nothing later in this process could be trusted, so that it ends with `BROKEN`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from dit_accel.environment import environment

from . import attention, backward, backward_launches, checks, launches, steps
from .job import Job, Row

READY, DONE = "ready", "done"  # what a worker says beside its rows
BROKEN = 9
GPU_ERRORS = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]", "CUBLAS_STATUS_EXECUTION_FAILED")


def probe(device: str) -> Iterator[Row]:
    """What this runs on."""
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    yield {"kind": "machine", "environment": environment(), "capability": list(capability)}


def fault(device: str, what: str) -> Iterator[Row]:
    """What can go wrong on a GPU, on purpose: part of every rehearsal."""
    yield {"kind": "fault", "what": what}
    if what == "hang":
        time.sleep(3600)
    if what == "crash":
        os.abort()
    raise RuntimeError(f"CUDA error: {what}")


KINDS: dict[str, Callable[..., Iterator[Row]]] = {
    "probe": probe,
    "fault": fault,
    "check": checks.run,
    "check launch": checks.run_launch,
    "check gradients": checks.run_gradients,
    "check backward launch": backward_launches.run_check,
    "matmul": attention.run_matmul,
    "attention": attention.run,
    "backward": backward.run,
    "launch": launches.run,
    "backward launch": backward_launches.run,
    "step": steps.run,
}


def do(job: Job, device: str, say: Callable[[Row], None]) -> bool:
    """Does a job; False if the GPU cannot be used in this process any more."""
    try:
        for row in KINDS[job.kind](device, **job.arguments):
            say(row)
    except Exception as error:  # whatever it is, it is the result of this job
        text = str(error).strip() or type(error).__name__
        broken = any(words in text for words in GPU_ERRORS) and not isinstance(error, torch.OutOfMemoryError)
        say({"kind": "left out", "reason": f"{type(error).__name__}: {text}"[:600]})
        return not broken
    return True


def serve(device: str, pipe: Connection, log: Path) -> None:
    """Does the jobs that come through a pipe, until it is closed; what is printed is added to a log."""
    os.setsid()  # a group of its own, which ends as a whole
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    _reach(device)
    pipe.send(READY)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        if not do(job, device, pipe.send):
            sys.exit(BROKEN)
        pipe.send(DONE)


def _reach(device: str) -> None:
    """Reaching the device takes seconds, which are no part of a job."""
    torch.set_grad_enabled(False)
    if device == "cuda":
        torch.zeros(1, device="cuda")


def main() -> int:
    """Runs one job in this process and sends its rows to the parent; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.evals.gpu_bench.worker", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--job", type=Job.from_json, required=True)
    options = parser.parse_args()
    _reach(options.device)
    fine = do(options.job, options.device, lambda row: print(json.dumps(row), flush=True))
    return 0 if fine else BROKEN


if __name__ == "__main__":
    sys.exit(main())
