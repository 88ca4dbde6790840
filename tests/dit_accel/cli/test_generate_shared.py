"""`dit-accel generate --share`: several processes make the picture of one, and what cannot be is one line."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ARGUMENTS = ("--model", "tiny-flux", "--prompt", "a fox", "--size", "192x192", "--steps", "1")


@pytest.fixture
def generate(cli_of):
    return cli_of("generate")


@pytest.mark.slow
@pytest.mark.parametrize(("share", "recipe"), [("heads", "tiny-flux-routed"), ("rows", "tiny-flux-clear")])
def test_two_processes_make_the_picture_of_one(generate, tmp_path, share, recipe):
    if share == "rows":  # which has dense steps, and rows have none
        recipe = tmp_path / "local.yaml"
        recipe.write_text("attention: {pattern: Clear, radius: 6}\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "dit_accel.cli", "generate", *ARGUMENTS]
    launch += [
        "--recipe",
        str(recipe),
        "--device",
        "cpu",
        "--share",
        share,
        "--out",
        str(tmp_path / "two.png"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    generate.run(*ARGUMENTS, "--recipe", recipe, "--device", "cpu", "--out", tmp_path / "one.png")
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("one.png", "two.png"))
    assert np.abs(one - two).max() <= 1


def test_what_cannot_be_shared_is_one_line(generate, monkeypatch):
    assert "`--share` must be heads or rows" in generate.error(*ARGUMENTS, "--share", "pixels")
    assert "start them with `accelerate launch`" in generate.error(*ARGUMENTS, "--share", "heads")
    assert "needs a `--recipe`" in generate.error(*ARGUMENTS, "--share", "rows")
    shared = ("--share", "heads", "--highres", "growing")
    assert "do not go together" in generate.error(*ARGUMENTS, *shared)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "would each make the same; give `--share heads` or `rows`" in generate.error(*ARGUMENTS)
