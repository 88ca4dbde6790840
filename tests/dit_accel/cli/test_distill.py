"""`dit-accel distill`: files that work together, what it says, and what it refuses before any work."""

import pytest

from dit_accel import Recipe
from dit_accel.patterns import Clear

MODEL = ("--model", "tiny-flux", "--size", "64x64", "--sampling-steps", 2)
SMALL = (*MODEL, "--steps", 2, "--batch", 1, "--rank", 2, "--rate", 1e-3, "--precision", "fp32")
PROMPTS = ("--prompt", "a fox at the top left", "--prompt", "an apple")


@pytest.fixture(scope="module")
def command(cli_of):
    return cli_of("distill")


@pytest.fixture
def recipe(tmp_path):
    Recipe(Clear(2), dense_steps=1).save(tmp_path / "recipe.yaml")
    return ("--recipe", tmp_path / "recipe.yaml")


def test_files_that_work_together(command, strict, recipe, tmp_path):
    """The recipe names the adapter beside it, also after the folder has moved; the same again is done."""
    out = tmp_path / "made" / "clear"
    line = (*SMALL, *PROMPTS, *recipe, "--held-out", 1, "--out", out, "--json")
    said = strict(command.run(*line).stdout)
    assert said["steps"] == said["samples"] == 2
    assert {"error", "error_without"} <= said.keys()
    assert strict(command.run(*line).stdout) == said
    (tmp_path / "made").rename(tmp_path / "moved")
    found = Recipe.load(tmp_path / "moved" / "clear.yaml")
    assert found == Recipe(Clear(2), dense_steps=1, adapter=tmp_path / "moved" / "clear")
    assert (tmp_path / "moved" / "clear.state" / "checkpoint.pt").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give what to train on: --prompts FILE, --prompt TEXT, or --data FOLDER"),
        ((*PROMPTS, "--data", "x"), "or a folder, by --data; not both"),
        (("--data", "nowhere"), "there is no folder nowhere"),
        ((*PROMPTS, "--optimizer", "sgd"), "`optimizer` must be 'adamw' or 'prodigy', got 'sgd'"),
        ((*PROMPTS, "--empty", 1), "`empty` must be a share from 0 to below 1, got 1"),
        ((*PROMPTS, "--size", "65x64"), "width must be a multiple of"),
        ((*PROMPTS, "--taps", "double.7"), "`taps` names the layer 'double.7'"),
    ],
)
def test_refused_before_any_work(command, recipe, tmp_path, arguments, message):
    assert message in command.error(*MODEL, *arguments, *recipe, "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_the_recipe_that_is_read_is_not_written_over(command, recipe, tmp_path):
    own = (tmp_path / "recipe.yaml").read_text()
    message = command.error(*SMALL, *PROMPTS, *recipe, "--out", tmp_path / "recipe")
    assert f"would write its recipe over {tmp_path / 'recipe.yaml'}, which it reads; name" in message
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert (tmp_path / "recipe.yaml").read_text() == own
    assert "must end in the name of a folder, got '.'" in command.error(
        *SMALL, *PROMPTS, *recipe, "--out", "."
    )


def test_a_recipe_without_gradients_is_unavailable(command, tmp_path):
    Recipe(Clear(2), quantization="int8").save(tmp_path / "int8.yaml")
    line = (*MODEL, *PROMPTS, "--recipe", tmp_path / "int8.yaml", "--out", tmp_path / "out")
    assert "quantized attention has no gradients" in command.error(*line, code=3)
