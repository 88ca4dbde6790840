"""Works through the schedule in time and keeps measurements as they come; never touches the GPU itself."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dit_accel.kernels.block_sparse import triton_configs, tuned
from dit_accel.kernels.block_sparse.tuned import BACKWARD_PARTS, Launch

from ..benchmarks.table import append
from . import launches, profile, report, schedule, tuning
from .attention import dtype_on
from .job import Job, Row
from .process import Worker

WRITING = 5.0  # seconds set aside for the page and the table
FEWEST = 2.0  # seconds below which no job is begun
MOST_PROCESSES = 12


def available(device: str) -> bool:
    """Whether a run can be made on a device of this type; its launches are of NVIDIA's GPUs."""
    return device == "cpu" or (torch.cuda.is_available() and torch.version.hip is None)


class Budget:
    """Shares the time left among the phases to come, so that what one does not need goes to the next."""

    def __init__(self, seconds: float, shares: dict[str, float], now: Callable[[], float] = time.monotonic):
        self.seconds, self.shares = seconds, shares
        self._now, self._begin = now, now()

    @property
    def spent(self) -> float:
        return self._now() - self._begin

    def deadline(self, phase: str) -> float:
        """When, on the clock of `spent`, a phase that begins now has to end."""
        names = list(self.shares)
        coming = [self.shares[name] for name in names[names.index(phase) :]]
        return self.spent + max(0.0, self.seconds - WRITING - self.spent) * coming[0] / sum(coming)


class Bench:
    """One run: `run` does all of it.

    Attributes:
        rows: what was measured, in the order it came; also the lines of `measurements.jsonl`.
        entries: of the table of launches, once the grid was measured.
    """

    def __init__(self, device: str, minutes: float, out: Path, cores: int, commit: str | None = None):
        """`commit` is recorded where this does not run from a clone.

        Raises:
            ValueError: a table of launches, the kernel's or one in `out`, is damaged.
        """
        self.device, self.out, self.cores, self.commit = device, out, cores, commit
        self.known = tuned.load(tuned.PATH) | tuned.load(out / tuned.PATH.name)
        out.mkdir(parents=True, exist_ok=True)
        self.budget = Budget(minutes * 60, schedule.SHARES[device])
        self.rows: list[Row] = []
        self.entries: list[tuned.Entry] = []
        self._machine: Row | None = None
        self._yardsticks = report.Yardsticks()
        self._lock = threading.Lock()

    def run(self) -> bool:
        """Everything; whether something was checked and all of it is right."""
        phases = schedule.of(self.device)
        self._check([Job("probe", "probe")], 1)
        for job, reason in schedule.missing(self.device):
            self._record(job, _left_out(reason))
        self._check(phases.checks, max(2, min(self.cores - 2, MOST_PROCESSES)))
        with self._worker() as worker:
            self._one_by_one("rate", phases.rate, worker)
            self._one_by_one("shapes", phases.shapes, worker)
            self._one_by_one("backward", phases.backward, worker)
            for phase, parts in schedule.GRIDS.items():
                self._grid(phase, parts, worker)
            self._one_by_one("steps", phases.steps, worker)
        self._profile()
        self._write()
        checked = any(row["kind"] == "check" for row in self.rows)
        return checked and not any(report.is_wrong(row) for row in self.rows)

    # -- phases ----------------------------------------------------------------------------------------------

    def _check(self, jobs: list[Job], side_by_side: int) -> None:
        """Each job in a process of its own, several at a time: most of it is compiling."""
        deadline = self.budget.deadline("check")

        def work(job: Job) -> None:
            with self._worker() as worker:
                self._do("check", job, worker, deadline)

        with ThreadPoolExecutor(side_by_side) as pool:
            list(pool.map(work, jobs))

    def _one_by_one(self, phase: str, jobs: list[Job], worker: Worker) -> None:
        deadline = self.budget.deadline(phase)
        for job in jobs:
            self._do(phase, job, worker, deadline)
        self._write()

    def _grid(self, phase: str, parts: tuple[str, ...], worker: Worker) -> None:
        """The launches of parts that are right, on each case those not hopeless on the one before."""
        if self._machine is None:
            self._record(Job("launch", phase), _left_out("what this runs on is not known"))
            return
        deadline, defaults = self.budget.deadline(phase), self._defaults(self._machine["capability"])
        right = report.right_launches(self.rows)
        for head_dim, chosen in schedule.tuning_cases(self.device).items():
            for default in (launch for launch in defaults[head_dim] if launch.part in parts):
                fine = (launch for launch in right.get(head_dim, ()) if launch.part == default.part)
                running = list(dict.fromkeys([default, *fine]))
                for case in chosen:
                    running.sort(key=lambda launch: launch.block_keys)  # masks of one size are built once
                    for job in schedule.grid(case, running):
                        self._do(phase, job, worker, deadline)
                    running = tuning.promising(self._launches(), case, default)
        self.entries = tuning.entries(self._launches(), defaults, self._machine)
        self._write()

    def _launches(self) -> list[Row]:
        return [row for row in self.rows if row["kind"] == "launch"]

    def _defaults(self, capability: list[int]) -> dict[int, tuple[Launch, ...]]:
        """By head_dim, what the kernels with pointers launch where nothing was measured: for each part."""
        cases, dtype = schedule.tuning_cases(self.device), dtype_on(self.device)
        if self.device == "cpu":
            grids = *launches.REHEARSAL_GRID, *launches.REHEARSAL_BACKWARD_GRID
            first = {launch.part: launch for launch in reversed(grids)}
            return dict.fromkeys(cases, tuple(first[part] for part in ("forward", *BACKWARD_PARTS)))
        gpu = capability[0], capability[1]
        return {
            dim: (
                triton_configs.untuned(dim, dtype, gpu),
                *(triton_configs.untuned_backward(p, "pointer", dim, dtype, gpu) for p in BACKWARD_PARTS),
            )
            for dim in cases
        }

    def _profile(self) -> None:
        deadline, most = self.budget.deadline("profile"), schedule.SECONDS[self.device]["profile"]
        real, small = schedule.profiled(self.device)
        for tool, job in ((profile.COUNTERS, real), (profile.MEMORY, small), (profile.RACES, small)):
            left = min(most, deadline - self.budget.spent)
            if left < FEWEST:
                row = _left_out("no time left in its phase")
            else:
                row = profile.run(tool, job, self.device, left, self.out)
            self._record(Job("profile", f"{tool.name} of {job.name}"), row)

    # -- one job ---------------------------------------------------------------------------------------------

    def _worker(self) -> Worker:
        return Worker(self.device, self.out / "worker.log")

    def _do(self, phase: str, job: Job, worker: Worker, deadline: float) -> None:
        """A job, if there is time for it; what keeps it from its end is a row as well."""
        left = deadline - self.budget.spent
        if left < FEWEST:
            self._record(job, _left_out("no time left in its phase"))
            return
        limit = schedule.limit(self.device, phase, job)
        reason = worker.run(job, limit, left, lambda row: self._record(job, row))
        if reason is not None:
            self._record(job, _left_out(reason))

    def _record(self, job: Job, row: Row) -> None:
        """Keeps a row and prints it, at once."""
        row = {"at": round(self.budget.spent, 2), "job": job.name, **row}
        with self._lock:
            if row["kind"] == "machine":
                row["environment"]["commit"] = row["environment"]["commit"] or self.commit
                self._machine = row
            self.rows.append(row)
            with (self.out / "measurements.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"[{row['at']:5.0f} s] {report.line(row)}", flush=True)
            self._yardsticks.see(row)
            if self._machine is not None:
                here = self._machine["environment"]
                found = report.csv_rows(row, self._yardsticks, here, self.device)
                append(self.out / f"bench_{self.device}.csv", found)

    def _write(self) -> None:
        """The page and the table of launches, as far as they are known."""
        page = report.page(self.rows, self.entries, self.device)
        (self.out / f"bench_{self.device}.md").write_text(page)
        if self.entries:
            tuned.save(self.out / tuned.PATH.name, [*self.known.values(), *self.entries])


def _left_out(reason: str) -> Row:
    return {"kind": "left out", "reason": reason}
