"""Peak memory: of the work itself, not of what was done before."""

import sys

import numpy as np
import pytest
import torch

from dit_accel.evals.benchmarks import memory

CPU = torch.device("cpu")
MIB = 2**20


def touch(mib: int) -> int:
    return int(np.ones(mib * MIB, np.uint8).sum()) // MIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_peak_is_forgotten_before_the_next():
    before, none = memory.watch(lambda: 0, CPU)
    large, high = memory.watch(lambda: touch(300), CPU)
    small, low = memory.watch(lambda: touch(100), CPU)
    assert (before, large, small) == (0, 300, 100)
    assert 290 < (high - none) / MIB < 330
    assert 90 < (low - none) / MIB < 130
    assert "resident set" in memory.describe(CPU)


def test_where_it_cannot_be_read_there_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "none" / "clear_refs")
    assert memory.watch(lambda: "done", CPU) == ("done", None)
    assert "Linux with glibc" in memory.describe(CPU)
