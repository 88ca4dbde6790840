"""The benchmark of int8 attention checks before it times, and writes what it measured."""

import csv

import pytest
import torch

from dit_accel.evals.benchmarks import quantization
from dit_accel.kernels import can_run
from dit_accel.patterns import Dense

ASKED = {"device": "cpu", "dtype": torch.float32, "head_dim": 64, "block_size": (64, 16)}


@pytest.mark.skipif(can_run("native", **ASKED) is not None, reason="native does not run here")
def test_it_writes_every_way_and_leaves_the_threads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantization, "PATTERNS", (Dense(),))
    threads = torch.get_num_threads()
    assert quantization.main(["--side", "8", "--repeats", "1", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    with (tmp_path / "bench_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == [*quantization.WAYS] * 2
    assert {row["kernel"] for row in rows} == {"quantized"}
    page = (tmp_path / "quantization_cpu.md").read_text()
    assert page.count("| Dense() |") == 2 == len(capsys.readouterr().out.splitlines())
    assert "int8 over bf16" in page


@pytest.mark.skipif(can_run("native", **ASKED) is not None, reason="native does not run here")
def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(quantization, "LARGEST_ERROR", 1e-5)
    monkeypatch.setattr(quantization, "in_turn", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(AssertionError, match=r"int8, head_dim 64: error .* times what is allowed"):
        quantization.measure(Dense(), 8, 64, 1)
