"""`dit-accel plan`: what it prints, its JSON, its picture and its errors."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from dit_accel.masks.plot import CAPTION, MARGIN, PANEL
from dit_accel.runtime import speed_table

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
