"""`dit-accel plan`: what it prints, its JSON, its picture and its errors."""

from __future__ import annotations

import dataclasses
import json

import pytest
from PIL import Image

from dit_accel.masks.plot import CAPTION, MARGIN, PANEL
from dit_accel.runtime import measured_speed, speed_table

TINY = ("--model", "tiny-flux", "--size", "128x128")
RECIPE = "attention: {pattern: Clear, radius: 4}\nname: disc\ndense_steps: 1\n"


@pytest.fixture
def plan(cli_of):
    return cli_of("plan")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "disc.yaml"
    path.write_text(RECIPE)
    return path


def test_help_has_an_example(plan):
    assert "Example: dit-accel plan" in " ".join(plan.run("--help").stdout.split())


def test_tables_say_what_the_json_says(plan, recipe):
    answer = json.loads(plan.run(*TINY, "--recipe", recipe, "--device", "cpu", "--json").stdout)
    assert answer["schema"] == "dit-accel/plan/1"
    assert (answer["grid"], answer["tokens"], answer["text_tokens"]) == ([1, 16, 16], 256 + 24, 24)
    assert (answer["steps"], answer["dense_steps"]) == (20, 1)
    assert len(answer["flops"]["layers"]) == 6
    shown = plan.run(*TINY, "--recipe", recipe, "--device", "cpu").stdout
    assert f"{answer['density']:.4f} of all layers" in shown
    for order in answer["orders"]:
        assert f"{order['block_density']:.4f}" in shown
    assert f"{answer['run']['predicted']:.2f}" in shown
    assert "never made" in shown
    assert all(line in shown for line in answer["notes"])


def test_a_gpu_that_is_not_here_is_planned_without_a_made_up_number(plan, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(speed_table, "SHIPPED", tmp_path)
    answer = json.loads(plan.run(*TINY, "--recipe", recipe, "--device", "cuda", "--json").stdout)
    assert (answer["block_size"], answer["dtype"]) == ([128, 64], "bfloat16")
    assert answer["attention"]["predicted"] is None
    assert answer["attention"]["ideal"] == pytest.approx(1 / answer["block_density"])
    assert "not measured" in plan.run(*TINY, "--recipe", recipe, "--device", "cuda").stdout


def test_plot(plan, recipe, tmp_path):
    path = tmp_path / "new" / "mask.png"
    answer = json.loads(plan.run(*TINY, "--recipe", recipe, "--plot", path, "--json").stdout)
    assert answer["plot"] == str(path)
    with Image.open(path) as image:
        assert image.size == (2 * PANEL + 3 * MARGIN, PANEL + CAPTION + 2 * MARGIN)
        assert image.getextrema() == (0, 255)


def test_bad_input_is_one_line(plan, recipe, tmp_path):
    dense = tmp_path / "dense.yaml"
    dense.write_text("attention: Dense\n")
    assert "the families are" in plan.error("--family", "sora", "--recipe", recipe)
    assert "either `model` or `family`" in plan.error("--recipe", recipe)
    assert "multiple of 8" in plan.error("--model", "tiny-flux", "--size", "100x128", "--recipe", recipe)
    assert "must be at most 4194304 tokens" in plan.error(
        "--model", "tiny-flux", "--size", "1000000x1000000", "--recipe", recipe
    )
    assert "makes images" in plan.error(*TINY, "--frames", 5, "--recipe", recipe)
    assert "is for the family 'wan'" in plan.error(*TINY, "--recipe", "wan-radial")
    assert "window" in plan.error(*TINY, "--recipe", "tiny-flux-neighborhood")
    assert "must end in .png" in plan.error(*TINY, "--recipe", recipe, "--plot", tmp_path / "mask.jpg")
    assert "no sparse layer" in plan.error(*TINY, "--recipe", dense, "--plot", tmp_path / "mask.png")
    assert "--device` must be" in plan.error(*TINY, "--recipe", recipe, "--device", "tpu")
    assert "--dtype` must be" in plan.error(*TINY, "--recipe", recipe, "--dtype", "int8")


def test_a_format_in_place_of_the_recipes(plan, recipe, monkeypatch):
    """Counted by what was measured of it, or said to be counted as none."""
    table = speed_table.speed_tables("cpu")[-1]
    case = speed_table.QuantizedCase("float32", 64, "int8", 4096, 0.25, 1.25)
    asked = (*TINY, "--recipe", recipe, "--device", "cpu", "--json")
    answers = []
    for quantized in ((), (case,)):
        tables = [dataclasses.replace(table, quantized=quantized)]
        monkeypatch.setattr(measured_speed, "speed_tables", lambda _, tables=tables: tables)
        answers.append(json.loads(plan.run(*asked, "--quantization", "int8").stdout))
    plain = json.loads(plan.run(*asked).stdout)
    (unknown, known), predicted = answers, plain["attention"]["predicted"]
    assert unknown["recipe"] == "disc+int8"
    assert any("'int8' is counted as if it took as long as none: not measured" in n for n in unknown["notes"])
    assert any("'int8' is counted as 1.25 times as fast as none, as measured" in n for n in known["notes"])
    assert unknown["attention"]["predicted"] == predicted < known["attention"]["predicted"]
    assert known["attention"]["ideal"] == plain["attention"]["ideal"]
    assert "`--quantization` must be one of int8, int8-fp8" in plan.error(*asked, "--quantization", "int7")


def test_formats_of_recipes(cli_of):
    from dit_accel import Recipe
    from dit_accel.cli.options import with_quantization
    from dit_accel.patterns import Clear, Dense

    named = Recipe(Clear(4), quantization="int8-fp8", name="disc")
    assert with_quantization(named, None) is named
    assert with_quantization(named, "int8") == Recipe(Clear(4), quantization="int8")
    assert with_quantization(named, "none") == Recipe(Clear(4))
    assert with_quantization(named, "none").name == "disc+unquantized"
    assert with_quantization(None, "int8") == Recipe(Dense(), quantization="int8")
    assert with_quantization(None, "none") is None
    for command in ("generate", "compare", "plan", "bench"):
        assert "--quantization" in cli_of(command).run("--help").stdout


def test_several_gpus(plan, recipe):
    asked = (*TINY, "--recipe", recipe, "--device", "cpu", "--gpus", "2", "--link", "10")
    heads, rows = json.loads(plan.run(*asked, "--json").stdout)["gpus"]
    assert heads["sent_bytes"] > 0 == heads["halo_bytes"]
    assert heads["seconds"] is None
    assert "dense_steps=0" in rows["refused"]
    shown = plan.run(*asked, "--call-seconds", "3").stdout
    assert f"{heads['exchange_seconds']:.4g} s" in shown
    assert "are a model: one device's time divided" in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--link", "10"), "`--link` and `--call-seconds` are for `--gpus`"),
        (("--gpus", "1"), "`gpus` must be at least 2"),
    ],
)
def test_several_gpus_bad_input(plan, recipe, more, message):
    assert message in plan.error(*TINY, "--recipe", recipe, *more)
