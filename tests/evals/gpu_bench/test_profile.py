"""NVIDIA's tools: left out where they are missing or slow, and given a whole worker otherwise."""

import stat
import sys

import pytest

from dit_accel.evals.gpu_bench import profile
from dit_accel.evals.gpu_bench.job import Job

JOB = Job("matmul", "matmul")


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A program on the path that does what a script says, and its tool."""

    def make(script: str) -> profile.Tool:
        program = tmp_path / "tool"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return profile.Tool("a-tool", "tool", ("--option",))

    return make


def test_missing(tmp_path):
    row = profile.run(profile.Tool("none", "no-such-program", ()), JOB, "cpu", 5, tmp_path)
    assert row == {"kind": "left out", "reason": "no-such-program is not installed"}
    assert not list(tmp_path.iterdir())


def test_a_worker_does_the_job_under_it(tool, tmp_path):
    row = profile.run(tool('echo "under $1"; shift; exec "$@"'), JOB, "cpu", 120, tmp_path)
    assert row == {"kind": "profile", "tool": "a-tool", "file": "profile_a-tool.txt", "exit_code": 0}
    text = (tmp_path / "profile_a-tool.txt").read_text()
    assert "under --option" in text
    assert '"kind": "matmul"' in text


def test_slow(tool, tmp_path):
    row = profile.run(tool("sleep 60"), JOB, "cpu", 0.5, tmp_path)
    assert "had not ended after 0 s" in row["reason"]


@pytest.mark.parametrize("known", [profile.COUNTERS, profile.MEMORY, profile.RACES], ids=lambda t: t.name)
def test_known_tools_are_run_by_this_python(known, tool, tmp_path):
    fake = tool('echo "$@"')
    profile.run(profile.Tool(known.name, fake.program, known.options), JOB, "cuda", 20, tmp_path)
    text = (tmp_path / f"profile_{known.name}.txt").read_text()
    assert text.startswith(" ".join(known.options))
    assert f"{sys.executable} -m dit_accel.evals.gpu_bench.worker --device cuda --job" in text
