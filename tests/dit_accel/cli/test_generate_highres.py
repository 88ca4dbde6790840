"""`dit-accel generate --highres`."""

import json

import pytest
from PIL import Image

PROMPT = "a fox at the top left on a blue striped background"


@pytest.fixture
def cli(cli_of):
    return cli_of("generate", "--model", "tiny-flux", "--prompt", PROMPT, "--device", "cpu")


def test_picture_above_native_size(cli, tmp_path):
    out, keep = tmp_path / "large.png", tmp_path / "base.safetensors"
    shared = ("--size", "96x80", "--steps", "3", "--keep", keep, "--json", "--out", out)
    answer = json.loads(cli.run("--highres", "swim", *shared).stdout)
    assert (answer["width"], answer["height"]) == (96, 80)
    assert Image.open(out).size == (96, 80)
    assert keep.is_file()
    first = out.read_bytes()
    cli.run("--highres", "upscaled", "--guidance-above", "2", "--recipe", "tiny-flux-clear", *shared)
    assert out.read_bytes() != first


def test_plan_of_a_run(cli, cli_of, tmp_path):
    shared = ("--highres", "upscaled", "--size", "128x128", "--steps", "4")
    answer = json.loads(cli.run(*shared, "--plan", "--json").stdout)
    names = [stage["name"] for stage in answer["stages"]]
    assert answer["schema"] == "dit-accel/plan-highres/1"
    assert names == ["native pass", "decode, enlarge, encode", "pass above native size", "decode"]
    shown = cli_of("plan", "--model", "tiny-flux", "--device", "cpu").run(*shared, "--strength", "0.5").stdout
    assert all(name in shown for name in names)
    assert f"{answer['peak'] / 1e6:.1f} MB" in shown


def test_presets_are_listed_and_planned(cli_of):
    listed = json.loads(cli_of("recipes", "--highres").run("--family", "flux", "--json").stdout)["presets"]
    assert [preset["name"] for preset in listed] == ["flux-swim", "flux-clear", "flux-imax", "flux-hiflow"]
    shown = " ".join(cli_of("recipes", "--highres").run().stdout.split())
    assert "hunyuan-video-swim" in shown
    plan = cli_of("plan", "--model", "tiny-flux", "--size", "96x96", "--device", "cpu", "--json")
    answer = json.loads(plan.run("--highres", "flux-clear").stdout)
    assert answer["method"] == "clear"
    assert [stage["steps"] for stage in answer["stages"]] == [20, 0, 14, 0]
    assert "is for the family 'wan', and this is 'flux'" in plan.error("--highres", "wan-swim")


def test_preset_on_a_model(cli, tmp_path):
    out = tmp_path / "large.png"
    cli.run("--highres", "flux-clear", "--size", "96x80", "--steps", "2", "--out", out)
    assert Image.open(out).size == (96, 80)
    assert "is for the family 'wan'" in cli.error("--highres", "wan-swim", "--size", "96x80")


def test_plans_refused(cli_of):
    plan = cli_of("plan", "--model", "tiny-flux")
    assert "give `--recipe`, or `--highres`" in plan.error()
    assert "`--highres` needs `--size`" in plan.error("--highres", "swim")
    assert "do not go with `--highres`" in plan.error("--highres", "swim", "--shift", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plan",), "belong to `--highres METHOD`"),
        (("--region", "0,0,1,1=x"), "`--region` belongs to `--highres regional`"),
        (("--highres", "regional", "--size", "96x80", "--region", "0,0,left=x"), "must be TOP,LEFT,BOTTOM"),
        (("--highres", "regional", "--size", "96x80", "--region", "0,0,1=x"), "`prompts` must be of boxes"),
        (("--highres", "swimm", "--size", "96x80"), "`--highres` must be one of swim, clear"),
        (("--highres", "flux-swimm", "--size", "96x80"), "or a preset (flux-swim, flux-clear"),
        (("--highres", "swim"), "`--highres` needs `--size`"),
        (("--keep", "x.safetensors"), "belong to `--highres METHOD`"),
        (("--highres", "swim", "--size", "96x80", "--keep", "x.png"), "`keep` must name a .safetensors file"),
        (("--highres", "swim", "--size", "96x80", "--strength", "2"), "`--strength` must be above 0"),
        (("--highres", "swim", "--size", "97x80"), "must be a multiple of 8"),
        (
            ("--highres", "swim", "--size", "96x80", "--guidance-above", "-1"),
            "must be a number of at least 0",
        ),
    ],
)
def test_refused(cli, arguments, message):
    assert message in cli.error(*arguments)
