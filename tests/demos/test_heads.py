"""The tab Heads: what a search says, and what perturbing a head does, in a browser and by the API."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("gradio", reason="needs dit-accel[demo]")
import numpy as np
from gradio_client.exceptions import AppError

from dit_accel import media
from dit_accel.demos import heads
from dit_accel.demos.settings import Settings

NO_HUNT = f"{heads.NO_HUNT}tiny-flux"


def settings(folder):
    return Settings(torch.device("cpu"), torch.float32, models=("tiny-flux",), results=folder)


@pytest.fixture
def log():
    """Of a search of two heads among tiny-flux's."""
    return {
        "schema": heads.SCHEMA,
        "settings": {"model": "tiny-flux"},
        "objective": "attributes",
        "layers": ["double.0", "double.1"],
        "heads_per_layer": 4,
        "without": 0.9,
        "best": [[0, 1]],
        "rounds": [{"means": [[0, 1, {"attributes": 0.95}], [1, 3, {"attributes": 0.85}]]}],
    }


def test_a_log_is_a_heat_map(tmp_path, log):
    (tmp_path / "hunt-tiny-flux.json").write_text(json.dumps(log))
    found = heads.read(settings(tmp_path), "hunt-tiny-flux.json")
    assert found.effects == pytest.approx({(0, 1): 0.05, (1, 3): -0.05})
    cells = [cell for row in heads.heat_map(found)["rows"] for cell in row["cells"]]
    assert len(cells) == 8
    assert [cell["mark"] for cell in cells].count("chosen") == 1
    assert "+0.0500" in cells[1]["title"]
    assert cells[0]["colour"] != cells[1]["colour"] != cells[7]["colour"]


def test_a_found_set_frames_its_heads(tmp_path):
    (tmp_path / "hunt-tiny-flux-heads.json").write_text('{"heads": [[0, 0], [5, 3]]}')
    found = heads.read(settings(tmp_path), "hunt-tiny-flux-heads.json")
    assert found.chosen == {(0, 0), (5, 3)}
    assert (len(found.layers), found.heads) == (6, 4)


@pytest.mark.parametrize("label", ["../../etc/passwd", "/etc/passwd", "hunt-tiny-flux.json", None, 3])
def test_only_what_is_listed_is_opened(tmp_path, label):
    with pytest.raises(ValueError, match="listed searches"):
        heads.read(settings(tmp_path), label)


def test_a_damaged_log_is_named(tmp_path, log):
    (tmp_path / "hunt-tiny-flux.json").write_text(json.dumps({**log, "rounds": []}))
    with pytest.raises(ValueError, match="no log of"):
        heads.read(settings(tmp_path), "hunt-tiny-flux.json")


def test_results_of_the_repository_are_read():
    known = heads.hunts(Settings(torch.device("cpu"), torch.float32, models=("tiny-flux", "tiny-sd3")))
    assert any(path is not None for path in known.values())


def test_python_perturbs_the_same_head(client, tmp_path, monkeypatch, held_out):
    given = (NO_HUNT, 2, 1, "soft_pag", 0.5, 3.0, held_out["tiny-flux"], 64, 64, None, 2, 1)
    pair, _, figures, recipe, python, _ = client.predict(*given, api_name="/perturb")
    assert "strength: 0.5" in recipe
    assert [row["label"] for row in figures] == ["dense", "perturbed"]
    monkeypatch.chdir(tmp_path)
    exec(compile(python, "exported", "exec"), {})
    shown = [media.load(Path(part["path"] if isinstance(part, dict) else part)) for part in pair]
    assert np.array_equal(media.load("picture.png"), shown[1])
    assert not np.array_equal(*shown)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [(1, 99, "Layer"), (2, -1, "Head|minimum"), (3, "exec", "Kind|choices"), (4, 2.0, "Strength|maximum")],
)
def test_heads_that_are_none_are_refused(client, held_out, place, value, words):
    given = [NO_HUNT, 0, 0, "soft_pag", 1.0, 3.0, held_out["tiny-flux"], 64, 64, None, 2, 1]
    given[place] = value
    with pytest.raises(AppError, match=words):
        client.predict(*given, api_name="/perturb")


def test_a_click_on_a_head_perturbs_it(open_page):
    page = open_page("Heads")
    cell = page.locator('#heat button.head[data-layer="1"][data-head="2"]')
    cell.wait_for()
    size = page.locator("#head-size")
    size.get_by_text("Size, steps and seed").click()
    size.get_by_label("Steps", exact=True).fill("2")
    cell.click()
    page.locator("#head-figures dd").first.wait_for()
    assert page.locator("#head-layer input").input_value() == "1"
    assert page.locator("#head-head input").input_value() == "2"
    assert page.locator("#head-pair img").count() == 2
