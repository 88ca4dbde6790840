"""The command: what it refuses, and what it says without a GPU."""

import pytest
import torch

from dit_accel.evals.gpu_bench.__main__ import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_prints_the_schedule(capsys, tmp_path):
    assert main(["--out", str(tmp_path / "out")]) == 3
    text = capsys.readouterr().out
    assert "no CUDA device here" in text
    assert "hunyuan-720p hunyuan-video-sta: triton" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0.1"], "must be from 0.2 to 600, got 0.1"),
        (["--minutes", "nan"], "must be from 0.2 to 600, got nan"),
        (["--minutes", "soon"], "invalid"),
        (["--device", "cpu", "--apply"], "a rehearsal on a CPU measures nothing"),
    ],
    ids=str,
)
def test_what_is_refused(arguments, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
