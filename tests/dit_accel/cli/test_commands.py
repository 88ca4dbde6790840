"""The command line on tiny untrained pipelines of the real classes: files, reports, exit codes and errors."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import typer
import yaml

from dit_accel import media
from dit_accel.cli.errors import reported

PROMPT = "a fox at the top left on a blue striped background"
COMMANDS = (["generate"], ["compare"], ["models"], ["recipes"], ["recipes", "show"], ["env"], ["eval"])
RECIPE = "attention: {pattern: Neighborhood, window: [5, 5], dilation: 1}\nname: near\n"
VIDEO_RECIPE = "attention: {pattern: Neighborhood, window: [2, 5, 5]}\nname: near\ndense_steps: 1\n"


@pytest.fixture
def cli(cli_of):
    return cli_of()


@pytest.fixture(scope="session")
def flux(tmp_path_factory):
    """A folder with an untrained tiny-flux."""
    return _save(tmp_path_factory, "tiny-flux")


@pytest.fixture(scope="session")
def wan(tmp_path_factory):
    """A folder with an untrained tiny-wan."""
    return _save(tmp_path_factory, "tiny-wan")


def _save(tmp_path_factory, name):
    from dit_accel.pipelines.tiny import INFO

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(name)
    INFO[name].build().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "near.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def video_recipe(tmp_path):
    path = tmp_path / "near-video.yaml"
    path.write_text(VIDEO_RECIPE)
    return path


# -- help and lists ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(cli, command):
    text = " ".join(cli.run(*command, "--help").stdout.split())
    assert "Usage:" in text
    assert "Example: dit-accel" in text or command == ["eval"]


@pytest.mark.parametrize("module", ["dit_accel", "dit_accel.cli"])
def test_modules_and_console_script_are_the_same(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Usage: dit-accel" in done.stdout


def test_models(cli):
    rows = json.loads(cli.run("models", "--json").stdout)["models"]
    assert {"tiny-flux", "tiny-wan"} <= {row["name"] for row in rows}
    for row in rows:
        assert row["demo"]["width"] >= row["native"]["width"]
        assert 0 < row["megabytes"] <= 12
    assert "tiny-wan" in cli.run("models").stdout


def test_recipes(cli):
    rows = json.loads(cli.run("recipes", "--json").stdout)["recipes"]
    assert {"flux", "wan"} <= {row["family"] for row in rows}
    assert all(row["source"] for row in rows)
    wan = json.loads(cli.run("recipes", "--family", "wan", "--json").stdout)["recipes"]
    assert wan == [row for row in rows if row["family"] == "wan"]
    assert rows[0]["name"] in cli.run("recipes").stdout
    assert "the families are" in cli.error("recipes", "--family", "sora")


def test_recipe_as_yaml_is_the_recipe(cli, tmp_path):
    from dit_accel import Recipe, presets

    name, preset = next(iter(presets().items()))
    text = cli.run("recipes", "show", name).stdout
    path = tmp_path / "copy.yaml"
    path.write_text(text)
    assert Recipe.load(path) == preset
    assert json.loads(cli.run("recipes", "show", name, "--json").stdout) == yaml.safe_load(text)


def test_env(cli):
    answer = json.loads(cli.run("env", "--json").stdout)
    assert answer["packages"]["torch"]
    assert answer["cpu"]["cores"] >= 1
    backends = {(row["backend"], row["device"], row["dtype"]): row["status"] for row in answer["backends"]}
    assert backends["gather", "cpu", "float32"] == "yes"
    assert all(backends.values())
    assert "torch" in cli.run("env").stdout


# -- generate ------------------------------------------------------------------------------------------------


def test_generate_image_is_reproducible(cli, flux, tmp_path):
    arguments = ("generate", "-m", flux, "-p", PROMPT, "--size", "64x48", "--steps", 2, "--json", "--out")
    answer = json.loads(cli.run(*arguments, tmp_path / "a.png").stdout)
    assert (answer["width"], answer["height"], answer["frames"]) == (64, 48, 1)
    assert answer["seconds"] > answer["seconds_per_step"] > 0
    cli.run(*arguments, tmp_path / "b.png")
    cli.run(*arguments, tmp_path / "c.png", "--seed", 1)
    first, same, other = (media.load(tmp_path / f"{name}.png") for name in "abc")
    assert first.shape == (1, 48, 64, 3)
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_generate_video(cli, wan, tmp_path, suffix):
    path = tmp_path / f"video{suffix}"
    cli.run(
        "generate", "-m", wan, "-p", PROMPT, "--size", "64x48", "--frames", 5, "--steps", 1, "--out", path
    )
    assert media.load(path).shape == (5, 48, 64, 3)


def test_generate_with_a_recipe(cli, flux, recipe, tmp_path):
    common = ("generate", "-m", flux, "-p", PROMPT, "--size", "96x96", "--steps", 2, "--out")
    cli.run(*common, tmp_path / "dense.png")
    result = cli.run(*common, tmp_path / "near.png", "--recipe", recipe)
    assert "Neighborhood" in result.stderr
    assert not np.array_equal(media.load(tmp_path / "dense.png"), media.load(tmp_path / "near.png"))


# -- compare -------------------------------------------------------------------------------------------------

METHOD_KEYS = {"name", "recipe", "seconds", "step_seconds", "step_seconds_median", "first_step_seconds"}
METHOD_KEYS |= {"warm_up_seconds", "speedup", "step_speedup", "pattern_density", "block_density"}
METHOD_KEYS |= {"run_density", "run_block_density", "mask_seconds", "identical", "psnr_db", "ssim"}


def test_compare_image(cli, flux, recipe, tmp_path):
    path = tmp_path / "new" / "folder" / "both.png"
    arguments = ("compare", "-m", flux, "-p", PROMPT, "-r", recipe, "--size", "96x80")
    arguments += ("--steps", 3, "--seed", 7)
    printed = json.loads(cli.run(*arguments, "--out", path, "--json").stdout)
    report = json.loads(path.with_suffix(".json").read_text())
    assert printed == report
    assert report["schema"] == "dit-accel/compare/1"
    assert report["command"].split()[0] == "dit-accel"
    assert report["environment"]["packages"]["torch"]
    settings = report["settings"]
    assert (settings["width"], settings["height"], settings["frames"]) == (96, 80, 1)
    assert (settings["steps"], settings["seed"], settings["dtype"]) == (3, 7, "float32")
    dense, near = report["methods"]
    assert set(dense) == set(near) == METHOD_KEYS
    assert (dense["name"], near["name"]) == ("dense", "near")
    assert dense["run_density"] == dense["speedup"] == dense["ssim"] == 1
    assert dense["psnr_db"] is None
    assert len(near["step_seconds"]) == 3
    assert near["step_seconds_median"] == pytest.approx(np.median(near["step_seconds"][1:]))
    assert near["speedup"] == pytest.approx(dense["seconds"] / near["seconds"])
    assert 0 < near["pattern_density"] < near["block_density"] <= 1
    assert near["run_density"] == pytest.approx(near["pattern_density"])
    assert 0 < near["psnr_db"] < 100
    assert 0 < near["ssim"] < 1
    assert sorted(file.name for file in path.parent.iterdir()) == ["both.json", "both.png"]
    assert media.load(path).shape[2] >= 2 * media.MIN_PANEL


def test_compare_video_with_several_recipes(cli, wan, video_recipe, tmp_path):
    dense_recipe = tmp_path / "all.yaml"
    dense_recipe.write_text("attention: {pattern: Dense}\nname: all\n")
    path = tmp_path / "both.gif"
    arguments = ("compare", "-m", wan, "-p", PROMPT, "-r", video_recipe, "-r", dense_recipe)
    arguments += ("--size", "64x64")
    result = cli.run(*arguments, "--frames", 5, "--steps", 2, "--repeats", 2, "--out", path)
    report = json.loads(path.with_suffix(".json").read_text())
    dense, near, every = report["methods"]
    assert near["run_density"] == pytest.approx((1 + near["pattern_density"]) / 2), (
        "the first of two steps is dense"
    )
    assert every["identical"], "Dense() is the untouched pipeline"
    assert not near["identical"]
    assert dense["name"] in result.stdout
    assert str(path) in result.stdout
    assert len(media.load(path)) == 5


@pytest.fixture
def blank(tmp_path):
    """A folder with a tiny-flux that draws one colour: its decoder ends in zeros."""
    import torch

    from dit_accel.pipelines.tiny import INFO

    pipe = INFO["tiny-flux"].build()
    for weight in pipe.vae.decoder.conv_out.parameters():
        torch.nn.init.zeros_(weight)
    pipe.save_pretrained(tmp_path / "blank")
    return tmp_path / "blank"


def test_pictures_of_one_colour_are_not_compared(cli, blank, recipe, tmp_path):
    run = ("-m", blank, "-p", PROMPT, "--size", "64x48", "--steps", 1)
    message = cli.error("compare", *run, "-r", recipe, "--out", tmp_path / "both.png")
    assert "dense: the model returned one colour, RGB (128, 128, 128), in every pixel" in message
    (tmp_path / "p.txt").write_text(PROMPT)
    out = ("--out", tmp_path / "sweep", "--prompts", tmp_path / "p.txt", "--no-plot", "--metrics", "psnr")
    assert "in every pixel" in cli.error("eval", "sweep", *run[:2], *run[4:], "-r", recipe, *out)
    assert not (tmp_path / "both.png").exists()
    assert not list((tmp_path / "sweep").rglob("*.png"))
    assert (
        "warning: every pixel has the same" in cli.run("generate", *run, "--out", tmp_path / "a.png").stderr
    )


def test_compare_leaves_the_dense_baseline_untouched(cli, flux, recipe, tmp_path):
    """What `compare` calls dense is what `generate` makes without a recipe."""
    common = ("-m", flux, "-p", PROMPT, "--size", "256x256", "--steps", 1)
    cli.run("generate", *common, "--out", tmp_path / "alone.png")
    cli.run("compare", *common, "-r", recipe, "--repeats", 2, "--out", tmp_path / "both.png")
    left = media.load(tmp_path / "both.png")[:, -256:, :256]
    assert np.array_equal(left, media.load(tmp_path / "alone.png"))


# -- eval ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eval_attributes(cli, tmp_path):
    out, what = tmp_path / "weak.json", ("--guidance", 1.5, "--label", "weak")
    command = ("eval", "attributes", "-m", "tiny-flux", "-n", 4, "--steps", 4, *what, "--out", out, "--json")
    answer = json.loads(cli.run(*command).stdout)
    assert json.loads(out.read_text()) == answer
    assert answer["model"] == "tiny-flux"
    assert answer["samples"] == answer["n"] == 4
    assert answer["settings"]["guidance"] == 1.5
    assert 0 <= answer["all_correct"] <= answer["mean"] <= 1
    assert "weak" in cli.run("eval", "report", out).stdout
    assert "accuracy" in cli.run("eval", "attributes", "-m", "tiny-flux", "-n", 2, "--steps", 2).stdout


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "64"], "must be WIDTHxHEIGHT in pixels, for example 512x512, got '64'"),
        (["--size", "0x64"], "must be WIDTHxHEIGHT"),
        (["--size", "60x64"], "width must be a multiple of 8 for this model, got 60; try 56 or 64"),
        (["--size", "1000000x1000000"], "must be at most 4194304 tokens, got 15625000000"),
        (["--size", f"16x{8 * 10**30}"], "must be at most 4194304 tokens, got 2"),
        (["--frames", "5"], "`--frames` is for video models"),
        (["--guidance", "nan"], "`--guidance` must be a number of at least 0"),
        (["--dtype", "int8"], "`--dtype` must be one of"),
        (["--device", "tpu"], "`--device` must be auto, cpu, cuda"),
        (["--recipe", "nothing"], "'nothing' is neither a preset nor a recipe file"),
        (["--recipe", "nothing.yaml"], "no recipe file at nothing.yaml"),
        (["--recipe", "wan-radial"], "family 'wan'"),
        (["--out", "picture.jpg"], "an image is written as .png, got the file name 'picture.jpg'"),
        (["--out", "."], "must name a file"),
        (["--out", "file/picture.png"], "is not a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_bad_input(cli, command, arguments, message, flux, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    needed = ["-r", recipe] if command == "compare" and "--recipe" not in arguments else []
    assert message in cli.error(command, "-m", flux, "-p", PROMPT, *needed, *arguments)
    assert sorted(tmp_path.iterdir()) == before, "nothing half-written is left"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("attention: {pattern: Clear, radius: -3}", "`radius` must be a positive number, got -3"),
        ("attention: {pattern: Clear, radius: [", "must be YAML or JSON"),
        ("attention: {pattern: Swirl}", "unknown pattern 'Swirl'"),
        ("attentoin: {pattern: Dense}", "must be a mapping with the key `attention`"),
        ("", "must be a mapping with the key `attention`"),
    ],
    ids=["negative-radius", "not-yaml", "unknown-pattern", "misspelt", "empty"],
)
def test_bad_recipe_file(cli, content, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert message in cli.error("generate", "-m", "tiny-flux", "-p", PROMPT, "-r", path)


def test_window_larger_than_its_axis(cli, flux, tmp_path):
    path = tmp_path / "wide.yaml"
    path.write_text("attention: {pattern: Neighborhood, window: [99, 99]}")
    out = tmp_path / "wide.png"
    assert "window" in cli.error(
        "generate", "-m", flux, "-p", PROMPT, "-r", path, "--size", "64x64", "--out", out
    )
    assert not out.exists()
    text = cli.run(
        "compare", "-m", flux, "-p", PROMPT, "-r", path, "--size", "64x64", "--out", out, code=1
    ).stderr
    assert "dense: run" not in text, "refused before any work"


def test_frames_that_the_model_cannot_make(cli, wan):
    message = cli.error("generate", "-m", wan, "-p", PROMPT, "--frames", 6)
    assert "must be a multiple of 4 plus 1 for this model, got 6; try 5 or 9" in message


def test_more_frames_than_any_model_can_make(cli, wan):
    message = cli.error("generate", "-m", wan, "-p", PROMPT, "--frames", 99_997, "--size", "1280x720")
    assert "must be at most 4194304 tokens, got " in message


def test_memory_that_is_not_there_is_one_line_without_cpp_frames(monkeypatch, capsys):
    @reported
    def command():
        torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.delenv("DIT_ACCEL_DEBUG", raising=False)
    with pytest.raises(typer.Exit) as raised:
        command()
    line = capsys.readouterr().err
    assert raised.value.exit_code == 1
    assert line.count("\n") == 1
    assert line.startswith(
        "error: not enough memory: 4294967296.0 GiB were asked for at once; take a smaller"
    )


def test_folder_that_is_not_a_pipeline(cli, tmp_path):
    assert str(tmp_path) in cli.error("generate", "-m", tmp_path, "-p", PROMPT)


def test_same_recipe_twice(cli, flux, recipe):
    assert "different recipes" in cli.error("compare", "-m", flux, "-p", PROMPT, "-r", recipe, "-r", recipe)


def test_attributes_of_a_model_without_known_captions(cli, flux):
    assert "bundled models only" in cli.error("eval", "attributes", "-m", flux, "-n", 1)


@pytest.mark.parametrize("device", ["cuda:99", "meta"])
def test_unavailable_device(cli, flux, device):
    assert device in cli.error("generate", "-m", flux, "-p", PROMPT, "--device", device, code=3)


def test_unavailable_backend(cli, flux, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "triton.yaml"
    path.write_text("attention: {pattern: Clear, radius: 3}\nbackend: triton\n")
    message = cli.error("generate", "-m", flux, "-p", PROMPT, "-r", path, "--device", "cpu", code=3)
    assert "triton" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "-m", "tiny-flux"],
        ["generate", "-m", "tiny-flux", "-p", PROMPT, "--steps", "0"],
        ["generate", "-m", "tiny-flux", "-p", PROMPT, "--wrong"],
        ["compare", "-m", "tiny-flux", "-p", PROMPT],
        ["unknown"],
    ],
    ids=["no-prompt", "no-steps", "unknown-option", "no-recipe", "unknown-command"],
)
def test_wrong_usage(cli, arguments):
    cli.run(*arguments, code=2)


def test_debug_shows_the_traceback(cli, flux, monkeypatch):
    monkeypatch.setenv("DIT_ACCEL_DEBUG", "")
    with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
        cli.run("--debug", "generate", "-m", flux, "-p", PROMPT, "--size", "64")
