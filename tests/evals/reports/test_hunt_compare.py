"""The comparison of found heads with no guidance and with whole layers."""

import csv
import json

import numpy as np
import pytest
import torch

from dit_accel.evals.reports import hunt_compare
from dit_accel.guidance import HeadPerturbation
from dit_accel.guidance.trials import Pair, Trials

FOUND = HeadPerturbation([(2, 1), (3, 0)], strength=0.5)


def test_methods_share_a_grid_and_the_first_layer():
    rows = hunt_compare.methods(FOUND, [hunt_compare.first_layer(FOUND)], [1.0, 4.0])
    assert rows[0] == ("none", None)
    assert [(name, guidance.scale) for name, guidance in rows[1:]] == [
        ("found heads", 1.0), ("found heads", 4.0), ("PAG layer 2", 1.0), ("PAG layer 2", 4.0)
    ]  # fmt: skip
    assert rows[1][1].heads == FOUND.heads
    assert rows[1][1].strength == 0.5
    assert rows[3][1].kind == "pag"


def test_intervals_are_of_paired_resamples():
    rng = np.random.default_rng(1)
    plain = rng.random(400)
    scores = plain + 0.1 + 0.001 * rng.standard_normal(400)
    row = hunt_compare.mean("good", scores, plain)
    assert row["good_low"] < row["good"] == scores.mean() < row["good_high"]
    deviation = scores.std() / 20
    assert row["good_high"] - row["good_low"] == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    width = row["good_change_high"] - row["good_change_low"]
    assert width == pytest.approx(2 * 1.96 * 0.001 / 20, rel=0.2)
    assert row["good_change_low"] < 0.1 < row["good_change_high"]


def test_rows(flux, tmp_path):
    """Calls of blocks are counted, and samples are those of each guidance."""

    def generate(pipe, prompts, seeds):
        latents = torch.cat([flux.run(pipe, grid=(2, 3), steps=2, seed=seed) for seed in seeds])
        return torch.sigmoid(latents)[..., :3].unflatten(1, (2, 3)).double().numpy()

    def brightness(images, prompts):
        return images.mean((1, 2, 3))

    def redness(images, prompts):
        return images[..., 0].mean((1, 2))

    brightness.name, redness.name = "brightness", "redness"

    def features(pictures):
        return torch.from_numpy(np.stack(pictures)).flatten(1)[:, :4].double()

    pairs = [Pair("a", seed) for seed in range(4)]
    trials = Trials(flux.pipe, [brightness, redness], tmp_path, generate=generate)
    methods = hunt_compare.methods(FOUND, [2], [4.0])
    reference = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    rows = hunt_compare.compare(trials, methods, pairs, features, reference)
    assert [row["block_calls"] for row in rows] == [2 * 4, 2 * (4 + 2), 2 * (4 + 2)]
    assert [row["extra_cost"] for row in rows] == [0, 0.5, 0.5]
    assert [value for key, value in rows[0].items() if "change" in key] == [0] * 9
    for row, (_, guidance) in zip(rows, methods, strict=True):
        images = np.stack([trials.image(guidance, pair) / 255 for pair in pairs])
        assert row["brightness"] == pytest.approx(images.mean(), abs=1e-6)
        assert row["redness"] == pytest.approx(images[..., 0].mean(), abs=1e-6)
    assert rows[1]["brightness"] != rows[2]["brightness"]
    text = hunt_compare.markdown("a model", rows, trials.objectives, "About.")
    assert "| extra cost | brightness | change | redness | change | Fréchet distance | change |" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| found heads | 4 | 0.500 |"))
    cells = [cell.split()[0] for cell in line.split("|")[4:-1]]
    shown = ("brightness", "brightness_change", "redness", "redness_change", "frechet", "frechet_change")
    assert cells == [f"{rows[1][key]:.3f}" for key in shown]


def test_a_distance_and_its_change():
    generator = torch.Generator().manual_seed(0)
    plain, reference = (torch.randn(200, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    row = hunt_compare.distance(plain + 1, plain, reference)
    assert row["frechet"] == pytest.approx(3, rel=0.2)  # the squared distance of the means
    assert 2 < row["frechet_change_low"] < row["frechet_change"] < row["frechet_change_high"] < 4
    same = hunt_compare.distance(plain, plain, reference)
    assert [value for key, value in same.items() if "change" in key] == [0, 0, 0]


@pytest.mark.slow
def test_command_writes_csv_and_markdown(tmp_path):
    call = {"width": 64, "height": 64, "num_inference_steps": 1, "max_sequence_length": 24}
    settings = {"call": call, "objective": "attributes", "pairs": [["a", 0]]}
    (tmp_path / "log.json").write_text(json.dumps({"settings": settings}))
    (tmp_path / "heads.json").write_text(json.dumps({"heads": [[5, 1]], "scale": 8.0}))
    arguments = ["tiny-flux", str(tmp_path), "-n", "2", "--scales", "2", "--out", str(tmp_path / "out")]
    hunt_compare.main(arguments)
    with (tmp_path / "out" / "hunt-tiny-flux.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["scale"], row["n"]) for row in rows] == [
        ("none", "0.0", "2"), ("found heads", "2.0", "2"), ("PAG layer 5", "2.0", "2")
    ]  # fmt: skip
    assert float(rows[1]["extra_cost"]) == pytest.approx(1 / 6)
    assert all(0 <= float(row["attributes"]) <= 1 and 0 < float(row["scenes"]) < 1 for row in rows)
    assert all(float(row["frechet"]) > 0 for row in rows)
    page = (tmp_path / "out" / "hunt-tiny-flux.md").read_text()
    assert "1 steps" in page
    assert "(hunt-tiny-flux-heads.json)" in page
    assert "heat-map" not in page  # the search has drawn none
    kept = (tmp_path / "out" / "hunt-tiny-flux-heads.json").read_bytes()
    assert kept == (tmp_path / "heads.json").read_bytes()
    settings["pairs"] = [list(hunt_compare.held_out_pairs(2, 1, [], "tiny-flux")[0][1])]
    with pytest.raises(ValueError, match="the search used 1 of these pairs; take another --seed, got 1"):
        hunt_compare.held_out_pairs(2, 1, settings["pairs"], "tiny-flux")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-wan", "."], "invalid choice: 'tiny-wan'"),
        (["tiny-flux", "."], "holds no log.json"),
        (["tiny-flux", ".", "-n", "1"], "at least 2, got 1"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        hunt_compare.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
