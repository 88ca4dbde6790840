"""Work in a process that may hang or crash: it costs the job it was at, nothing else.

Processes are forked from one that has imported everything and never touched the GPU: they start at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from . import worker
from .job import Job, Row

STARTUP = 120.0  # seconds that a worker has to reach the device


class Worker:
    """A process that does one job at a time. It starts with its first job, and again after it was lost."""

    def __init__(self, device: str, log: Path):
        """`log` is where what the process prints is added."""
        self.device, self.log = device, log
        self._process = self._pipe = None

    def run(self, job: Job, limit: float, left: float, record: Callable[[Row], None]) -> str | None:
        """Does a job, and hands over its rows as they come.

        Args:
            limit: seconds after which the process is ended; starting one does not count.
            left: seconds after which it is ended in any case.

        Returns:
            Why the process was lost, or None if the job came to its end.
        """
        deadline = time.monotonic() + left
        if self._process is None:
            self._start()
            if (reason := self._read(worker.READY, min(STARTUP, left), record)) is not None:
                return f"no process to do it in: {reason}"
        with suppress(BrokenPipeError):  # it has ended meanwhile, which reading finds out
            self._pipe.send(job)
        return self._read(worker.DONE, min(limit, deadline - time.monotonic()), record)

    def close(self) -> None:
        """Ends the process and all that it started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # where it has not yet a group of its own
        self._process.join()
        self._pipe.close()
        self._process = self._pipe = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([worker.__name__, "dit_accel.kernels.block_sparse.triton_forward"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=worker.serve, args=(self.device, theirs, self.log))
        self._process.start()
        theirs.close()

    def _read(self, end: str, limit: float, record: Callable[[Row], None]) -> str | None:
        """Passes rows on until the process says `end`; why the process was lost, or None."""
        deadline = time.monotonic() + limit
        while self._pipe.poll(max(0.0, deadline - time.monotonic())):
            try:
                said = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                self._process.join()
                code = self._process.exitcode
                self.close()
                return f"its process ended with {_ending(code)}; see {self.log.name}"
            if said == end:
                return None
            record(said)
        self.close()
        return f"no end after {limit:.0f} s: its process was ended"


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
