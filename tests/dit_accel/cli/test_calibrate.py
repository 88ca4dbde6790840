"""`dit-accel calibrate`: files that work together, what it says, and what it refuses before any work."""

import json

import pytest

import dit_accel
from dit_accel import Calibration, Recipe
from dit_accel.patterns import Calibrated

SMALL = ("--model", "tiny-wan", "--size", "64x64", "--frames", 5, "--steps", 2, "--prompt", "a red circle")


@pytest.fixture(scope="module")
def command(cli_of):
    return cli_of("calibrate")


def test_files_that_work_together(command, strict, tmp_path):
    """The recipe names the calibration beside it, also after the folder has moved."""
    out = tmp_path / "made" / "wan.safetensors"
    found = strict(command.run(*SMALL, "--density", 0.5, "--block-size", 16, "--out", out, "--json").stdout)
    assert found["family"] == "wan"
    assert found["density"] == 0.5
    assert found["about"]["prompts"] == ["a red circle"]
    assert sum(found["chosen"].values()) == 2 * found["layers"] * found["heads"]
    (tmp_path / "made").rename(tmp_path / "moved")
    recipe = Recipe.load(tmp_path / "moved" / "wan.yaml")
    assert recipe.family == "wan"
    assert recipe.attention == Calibrated(Calibration.load(tmp_path / "moved" / "wan.safetensors"))
    assert (tmp_path / "moved" / "wan.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "moved" / "wan.state").iterdir())
    pipe = dit_accel.pipelines.load("tiny-wan")
    dit_accel.enable(pipe, recipe)
    assert "then" in dit_accel.summary(pipe).rows[0]["pattern"] or dit_accel.summary(pipe).rows


def test_several_candidates_in_a_table(command, tmp_path):
    line = ("--density", 0.5, "--block-size", 16, "--candidates", "reordered, Clear", "--no-tails")
    printed = command.run(*SMALL, *line, "--out", tmp_path / "wan.safetensors").stdout
    assert "Heads of all stretches" in printed
    assert "picture: " in printed
    assert json.dumps(Calibration.load(tmp_path / "wan.safetensors").about)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--density", 2), "`--density` must be a number above 0 and at most 1, got 2"),
        (("--density", 0.5, "--candidates", "Spiral"), "a candidate must be 'reordered'"),
        (("--density", 0.5, "--budget", "layer"), "`budget` must be 'head' or 'global', got 'layer'"),
        (("--density", 0.5, "--size", "65x64"), "width must be a multiple of"),
    ],
)
def test_refused_before_any_work(command, tmp_path, arguments, message):
    assert message in command.error(*SMALL, *arguments, "--out", tmp_path / "wan.safetensors")
    assert not list(tmp_path.iterdir())


def test_names_of_files(command, tmp_path):
    assert "must end in .safetensors" in command.error(*SMALL, "--density", 0.5, "--out", tmp_path / "wan.pt")
