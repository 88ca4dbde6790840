"""`dit-accel hunt`: what it writes, resuming, published defaults, and its errors."""

import json
import sys

import numpy as np
import pytest

from dit_accel import media
from dit_accel.cli.hunt import _pairs, _published
from dit_accel.generation import Request
from dit_accel.guidance import HeadPerturbation
from dit_accel.guidance.objectives import named
from dit_accel.patterns import Dense
from dit_accel.recipe.recipe import Recipe

PROMPT = "a fox at the top left on a blue striped background"
CLIP = ("--objective", "clip", "--model", "tiny-flux", "-p", PROMPT)


@pytest.fixture
def hunt(cli_of):
    return cli_of("hunt")


def test_help_has_an_example(hunt):
    assert "Example: dit-accel hunt" in " ".join(hunt.run("--help").stdout.split())


@pytest.mark.slow
def test_hunt(hunt, cli_of, tmp_path):
    """tiny-flux by its attributes: 2 captions, 2 steps, 3 heads of its last two layers."""
    out = tmp_path / "new" / "hunt"
    arguments = ("-m", "tiny-flux", "--objective", "attributes", "-n", 2, "--steps", 2, "--rounds", 2)
    arguments += ("--top-k", 1, "--only", "single.2/heads.0-1,single.3/heads.3", "--out", out)
    answer = json.loads(hunt.run(*arguments, "--json").stdout)
    assert answer["layers"] == ["double.0", "double.1", "single.0", "single.1", "single.2", "single.3"]
    assert 0 <= answer["without"] <= 1
    assert [len(one["means"]) for one in answer["rounds"]] == [3, 2]
    assert len(answer["heads"]) == 2
    assert {tuple(head) for head in answer["heads"]} <= {(4, 0), (4, 1), (5, 3)}
    assert answer["guidance"]["scale"] == 8
    assert all(media.load(answer["files"][name]).size for name in ("heat map", "sheet"))

    heads = [tuple(head) for head in answer["heads"]]
    recipe = Recipe.load(out / "recipe.yaml")
    assert recipe == Recipe(Dense(), guidance=HeadPerturbation(answer["best"], scale=8.0))
    drawn = ("-m", "tiny-flux", "-p", PROMPT, "--steps", 1, "-r", out / "recipe.yaml")
    drawn = cli_of("generate").run(*drawn, "--out", tmp_path / "one.png")
    assert f"guidance: soft_pag of {len(answer['best'])} head" in drawn.stderr

    assert "log.json is of an earlier search" in hunt.error(*arguments)
    assert "another `call`" in hunt.error(*arguments, "--steps", 1, "--resume")
    again = hunt.run(*arguments, "--resume", "--no-pictures").stdout
    assert all(f"head {head}" in again for _, head in heads)
    assert f"{answer['rounds'][-1]['score']:.4f}" in again


@pytest.mark.slow
def test_hunt_by_the_bundled_net(hunt, tmp_path):
    """One caption, one step, 2 heads: scores are those of the kept images."""
    arguments = ("-m", "tiny-flux", "--objective", "scenes", "--at-least", "attributes=0", "-n", 1)
    arguments += ("--steps", 1, "--rounds", 1, "--top-k", 1, "--only", "single.3/heads.0-1", "--json")
    answer = json.loads(hunt.run(*arguments, "--no-pictures", "--out", tmp_path).stdout)
    assert answer["objective"] == "scenes"
    ((layer, head, means), (_, _, others)) = answer["rounds"][0]["means"]
    assert (layer, head, means.keys()) == (5, 0, {"scenes", "attributes"})
    assert answer["rounds"][0]["score"] == max(means["scenes"], others["scenes"])
    records = {path: json.loads(path.read_text()) for path in (tmp_path / "samples").glob("*.json")}
    ((path, record),) = ((path, one) for path, one in records.items() if one["guidance"] is None)
    image = media.load(path.with_suffix(".png")).astype(np.float32) / 255
    assert named("scenes")(image, [record["prompt"]]) == [answer["without"]]


def test_bad_input_is_one_line(hunt, tmp_path):
    out = ("--out", tmp_path / "out")
    tiny = ("--model", "tiny-flux", "--objective", "attributes", *out)
    (tmp_path / "file").write_text("")
    cases = {
        "must be one of attributes, scenes, clip": ("--model", "tiny-flux", "--objective", "fid", *out),
        "must be OBJECTIVE=MINIMUM": (*tiny, "--at-least", "attributes=much"),
        "checked for the bundled models only": ("--model", "a/b", "--objective", "attributes", *out),
        "models only: tiny-flux": ("--model", "a/b", "--objective", "scenes", *out),
        "got 'a cat'": ("--model", "tiny-flux", "--objective", "scenes", "-p", "a cat", *out),
        "there is no file": (*tiny, "--prompts", tmp_path / "none.txt"),
        "read from captions such as": (*tiny, "-p", "a cat"),
        "use -n 2, got 1": (*tiny, "-n", 1, "-p", PROMPT, "-p", f"{PROMPT} "),
        "`--out` must be a folder": (*tiny[:-1], tmp_path / "file"),
        "`--guidance` must be a number": (*tiny, "--guidance", "-1"),
        "`--size` must be WIDTHxHEIGHT": (*tiny, "--size", "64"),
        "neither a preset nor a recipe file": (*tiny, "--recipe", "fast"),
    }
    for message, arguments in cases.items():
        assert message in hunt.error(*arguments)
    assert "Usage" in hunt.run(*tiny, "--rounds", 0, code=2).stderr
    assert not (tmp_path / "out").exists()


def test_what_is_not_here_ends_with_3(hunt, tmp_path, monkeypatch):
    line = hunt.error(*CLIP, "--out", tmp_path, code=3)
    assert "openai/clip-vit-large-patch14" in line
    assert "--allow-download" in line
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "dit-accel[eval]"' in hunt.error(*CLIP, "--out", tmp_path, code=3)
    assert "clip-vit" in hunt.error(*CLIP, "--no-pictures", "--out", tmp_path, code=3)
    assert not list(tmp_path.iterdir())


def test_pairs(tmp_path):
    (tmp_path / "prompts.txt").write_text("b\n\n  c \n")
    assert _pairs(["a"], tmp_path / "prompts.txt", "x/y", 5, 7, False) == [
        ("a", 7), ("b", 8), ("c", 9), ("a", 10), ("b", 11)
    ]  # fmt: skip
    own = _pairs([], None, "tiny-flux", 3, 0, True)
    assert len(set(own)) == 3
    assert own == _pairs([], None, "tiny-flux", 3, 0, True)
    assert not set(own) & set(_pairs([], None, "tiny-flux", 3, 5, True))
    with pytest.raises(ValueError, match="give the prompts"):
        _pairs([], None, "x/y", 3, 0, False)


def test_steps_size_and_guidance_are_published_ones(flux, sd3, hunyuan):
    empty = Request("")
    assert _published(flux.pipe, empty) == Request("", 512, 512, steps=15, guidance=1.0)
    assert _published(sd3.pipe, empty) == Request("", steps=20, guidance=1.0)
    assert _published(hunyuan.pipe, empty).guidance is None  # distilled: the scale is an input of the model
    given = Request("", 64, 96, steps=3, guidance=2.0)
    assert _published(flux.pipe, given) == given
