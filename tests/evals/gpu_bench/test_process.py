"""A worker that hangs, crashes or loses its GPU costs one job; the next finds a new process."""

import os
import re

import pytest
import torch

from dit_accel.evals.gpu_bench import worker
from dit_accel.evals.gpu_bench.job import Job
from dit_accel.evals.gpu_bench.process import Worker

FINE = Job("matmul", "fine")


def fault(what: str) -> Job:
    return Job("fault", what, {"what": what})


@pytest.fixture
def run(tmp_path):
    """Does a job in a worker: its rows, and why the process was lost."""
    with Worker("cpu", tmp_path / "worker.log") as one:

        def call(job, limit=300.0, left=300.0):
            rows = []
            return rows, one.run(job, limit, left, rows.append)

        call.worker = one
        yield call


def pid(run) -> int:
    return run.worker._process.pid


def ended(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    return False


def test_jobs_share_a_process(run):
    rows, lost = run(FINE)
    assert (rows[0]["kind"], lost) == ("matmul", None)
    first = pid(run)
    assert run(FINE)[1] is None
    assert pid(run) == first != os.getpid()


def test_the_end_of_a_worker_is_the_end_of_its_process(run):
    run(FINE)
    number = pid(run)
    run.worker.close()
    assert ended(number)


def test_a_hang_is_ended_and_the_next_job_done(run):
    run(FINE)
    number = pid(run)
    rows, lost = run(fault("hang"), limit=2)
    assert rows == [{"kind": "fault", "what": "hang"}], "what it said before is kept"
    assert lost == "no end after 2 s: its process was ended"
    assert ended(number)
    assert run(FINE)[1] is None


def test_time_that_is_left_comes_before_a_jobs_own_limit(run):
    run(FINE)
    assert re.match("no end after [0-2] s", run(fault("hang"), limit=300, left=2)[1])


def test_a_crash_is_named_and_the_next_job_done(run):
    _, lost = run(fault("crash"))
    assert "signal SIGABRT; see worker.log" in lost
    assert run(FINE)[1] is None


def test_a_process_whose_gpu_is_lost_does_nothing_more(run):
    rows, lost = run(fault("an illegal memory access"))
    assert rows[-1] == {"kind": "left out", "reason": "RuntimeError: CUDA error: an illegal memory access"}
    assert f"exit code {worker.BROKEN}" in lost
    assert run(FINE)[1] is None


def test_an_ordinary_error_is_a_row_and_costs_no_process(run):
    run(FINE)
    number = pid(run)
    rows, lost = run(Job("attention", "unknown", {"case": ["no", "such"], "provider": "gather"}))
    assert rows[0]["kind"] == "left out"
    assert rows[0]["reason"].startswith("KeyError")
    assert lost is None
    assert pid(run) == number


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_cannot_be_reached_is_a_reason(tmp_path):
    log = tmp_path / "worker.log"
    with Worker("cuda", log) as one:
        lost = one.run(FINE, 300.0, 300.0, [].append)
    assert lost == "no process to do it in: its process ended with exit code 1; see worker.log"
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("error", "usable"),
    [
        (RuntimeError("CUDA error: unspecified launch failure"), False),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), False),
        (RuntimeError("out of resource: shared memory, Required: 300000"), True),
        (ValueError("bad"), True),
    ],
    ids=str,
)
def test_which_errors_leave_a_gpu_usable(monkeypatch, error, usable):
    def kind(device):
        yield {"kind": "before"}
        raise error

    monkeypatch.setitem(worker.KINDS, "matmul", kind)
    rows = []
    assert worker.do(FINE, "cpu", rows.append) is usable
    assert [row["kind"] for row in rows] == ["before", "left out"]


def test_out_of_memory_leaves_a_gpu_usable(monkeypatch):
    def kind(device):
        raise torch.OutOfMemoryError("CUDA error: out of memory")
        yield

    monkeypatch.setitem(worker.KINDS, "matmul", kind)
    assert worker.do(FINE, "cpu", [].append)


def test_jobs_travel_as_json():
    job = Job("launch", "a name", {"case": ["flux-1024", ""], "launch": [64, 32, 4, 2]})
    assert Job.from_json(job.to_json()) == job
