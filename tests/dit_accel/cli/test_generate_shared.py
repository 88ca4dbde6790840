"""`dit-accel generate --share`: several processes make the picture of one, and what cannot be is one line."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import processes
import pytest
from PIL import Image

ARGUMENTS = ("--model", "tiny-flux", "--prompt", "a fox", "--size", "192x192", "--steps", "1")


@pytest.fixture
def generate(cli_of):
    return cli_of("generate")


def is_the_picture_of_one(generate, folder, recipe):
    """Whether two.png of the folder is what one process makes."""
    generate.run(*ARGUMENTS, "--recipe", recipe, "--device", "cpu", "--out", folder / "one.png")
    one, two = (np.asarray(Image.open(folder / name)).astype(int) for name in ("one.png", "two.png"))
    return np.abs(one - two).max() <= 1


def shared(recipe, share, folder):
    """The arguments after `python` of a process that makes two.png with another one."""
    options = ["--recipe", str(recipe), "--device", "cpu", "--share", share, "--out", str(folder / "two.png")]
    return ["-m", "dit_accel.cli", "generate", *ARGUMENTS, *options]


@pytest.mark.slow
def test_two_processes_share_rows(generate, tmp_path):
    recipe = tmp_path / "local.yaml"  # presets have dense steps, and rows have none
    recipe.write_text("attention: {pattern: Clear, radius: 6}\n")
    processes.launch(tmp_path, *shared(recipe, "rows", tmp_path))
    assert is_the_picture_of_one(generate, tmp_path, recipe)


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_share_heads(generate, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "--main_process_port", "0", *shared("tiny-flux-routed", "heads", tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert is_the_picture_of_one(generate, tmp_path, "tiny-flux-routed")


def test_what_cannot_be_shared_is_one_line(generate, monkeypatch):
    assert "`--share` must be heads or rows" in generate.error(*ARGUMENTS, "--share", "pixels")
    assert "start them with `accelerate launch`" in generate.error(*ARGUMENTS, "--share", "heads")
    assert "needs a `--recipe`" in generate.error(*ARGUMENTS, "--share", "rows")
    both = ("--share", "heads", "--highres", "growing")
    assert "do not go together" in generate.error(*ARGUMENTS, *both)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "would each make the same; give `--share heads` or `rows`" in generate.error(*ARGUMENTS)
