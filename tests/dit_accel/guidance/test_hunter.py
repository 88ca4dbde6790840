"""HeadHunter: the search on painted images, then on a real tiny model, stopped, and in two processes."""

import inspect
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import dit_accel
from dit_accel.guidance import HeadHunter, HeadPerturbation
from dit_accel.guidance.hunt_pictures import HEADER, LABEL, effects_sheet, heat_map
from dit_accel.guidance.trials import Pair, Trials, fingerprint
from dit_accel.patterns import Clear
from dit_accel.recipe import Recipe

ROOT = Path(__file__).parents[3]
PAIRS = [("a", 0), ("b", 1)]
ALONE = {(0, 0): 3, (0, 1): -5, (1, 0): 8, (1, 1): 1, (2, 0): 6, (2, 1): 2, (3, 0): 0, (3, 1): 2}
TOGETHER = {frozenset({(1, 0), (0, 1)}): 20}  # a head that is only good beside another


def perturbed(pipe) -> tuple:
    guidance = dit_accel.handle_of(pipe).recipe.guidance
    return () if guidance is None else guidance.heads


def paint(pipe, prompts, seeds, base=50, seen=None):
    """In place of a model: grey pictures whose level tells which heads are perturbed, and the seed."""
    heads = perturbed(pipe)
    level = base + sum(ALONE[head] for head in heads)
    level += sum(bonus for pair, bonus in TOGETHER.items() if pair <= set(heads))
    if seen is not None:
        seen.extend((heads, seed) for seed in seeds)
    return np.stack([np.full((2, 2, 3), (level + seed % 3) / 255) for seed in seeds])


def level(images, prompts):
    assert len(images) == len(prompts)
    return images.mean((1, 2, 3)) * 255


def darkness(images, prompts):
    return [-score for score in level(images, prompts)]


def hunter(flux, folder, objective=level, pairs=PAIRS, seen=None, **options):
    options = {"rounds": 2, "top_k": 2, "call": {"base": 50}} | options
    painter = partial(paint, seen=seen)
    painter.name = "paint"
    return HeadHunter(flux.pipe, objective, pairs, folder, generate=painter, **options)


class TestSearch:
    def test_defaults_are_those_published_for_styles(self, flux, sd3, tmp_path):
        defaults = inspect.signature(HeadHunter).parameters
        assert (defaults["rounds"].default, defaults["top_k"].default) == (5, 3)
        assert hunter(flux, tmp_path).perturbation([(0, 0)]) == HeadPerturbation([(0, 0)], scale=8.0)
        assert hunter(sd3, tmp_path).perturbation([(0, 0)]) == HeadPerturbation([(0, 0)], scale=3.0)

    def test_each_round_adds_the_best_beside_those_chosen(self, flux, tmp_path):
        found = hunter(flux, tmp_path).run()
        assert found.without == pytest.approx(50.5)
        assert [one.chosen for one in found.rounds] == [((1, 0), (2, 0)), ((0, 1), (0, 0))]
        assert [one.score for one in found.rounds] == pytest.approx([64.5, 64.5 - 5 + 20 + 3])
        first, second = ({head: row["level"] for head, row in one.means.items()} for one in found.rounds)
        assert first == pytest.approx({head: 50.5 + value for head, value in ALONE.items()})
        assert second == pytest.approx(
            {
                head: 64.5 + ALONE[head] + (20 if head == (0, 1) else 0)
                for head in set(ALONE) - {(1, 0), (2, 0)}
            }
        )

    def test_ties_go_to_the_lower_layer_then_the_lower_head(self, flux, tmp_path):
        def flat(images, prompts):
            return [1.0] * len(images)

        found = hunter(flux, tmp_path, flat, top_k=3).run()
        assert found.heads == ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1))

    def test_heads_below_a_floor_are_not_added(self, flux, tmp_path):
        found = hunter(flux, tmp_path, darkness, floors=[(level, 50.2)], rounds=3, top_k=3).run()
        assert found.rounds[0].chosen == ((3, 0), (1, 1), (2, 1))  # (0, 1), the darkest, is below
        assert found.rounds[0].means[0, 1] == pytest.approx({"darkness": -45.5, "level": 45.5})
        few = hunter(flux, tmp_path / "few", darkness, floors=[(level, 56)], rounds=3, top_k=3).run()
        assert few.rounds[0].chosen == ((2, 0), (1, 0))  # fewer than top_k
        none = hunter(flux, tmp_path / "none", floors=[(level, 200)], rounds=3).run()
        assert (none.heads, len(none.rounds), none.perturbation) == ((), 1, None)
        assert not (tmp_path / "none" / "heads.json").exists()

    @pytest.mark.parametrize(
        ("heads", "scores", "kept"),
        [
            ([(2, 0), (0, 1)], [56.5, 51.5], 1),  # the second makes it worse
            ([(2, 0), (3, 0)], [56.5, 56.5], 1),  # nothing is gained
            ([(2, 0), (0, 1), (1, 0)], [58.5, 73.5, 79.5], 3),
        ],
    )
    def test_what_is_found_ends_with_the_best_round(self, flux, tmp_path, heads, scores, kept):
        found = hunter(flux, tmp_path, heads=heads, rounds=3, top_k=1).run()
        assert [one.score for one in found.rounds] == pytest.approx(scores)
        assert found.best == found.heads[:kept]
        assert found.perturbation == HeadPerturbation(found.best, scale=8.0)

    def test_some_heads_until_none_is_left(self, flux, tmp_path):
        found = hunter(flux, tmp_path, heads=[(3, 1), (0, 0), (2, 0)], rounds=9).run()
        assert [one.chosen for one in found.rounds] == [((2, 0), (0, 0)), ((3, 1),)]

    def test_what_is_enabled_stays_in_force(self, flux, tmp_path):
        handle = dit_accel.enable(flux.pipe, Clear(3))
        patterns = []

        def look(pipe, prompts, seeds):
            patterns.append(dit_accel.handle_of(pipe).recipe.attention)
            return paint(pipe, prompts, seeds)

        HeadHunter(flux.pipe, level, PAIRS, tmp_path, rounds=1, generate=look).run()
        assert set(patterns) == {Clear(3)}
        assert dit_accel.handle_of(flux.pipe) is handle
        assert handle.active


class Stops:
    """An objective after whose n-th batch the machine is switched off."""

    name = "level"

    def __init__(self, after):
        self.left = after

    def __call__(self, images, prompts):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return level(images, prompts)


class TestResume:
    @pytest.mark.parametrize("after", [0, 1, 5, 12])
    def test_stopped_and_resumed_is_as_never_stopped(self, flux, tmp_path, after):
        whole, first, second = [], [], []
        options = {"pairs": [*PAIRS, ("a", 2)], "batch": 2}
        expected = hunter(flux, tmp_path / "whole", seen=whole, **options).run()
        with pytest.raises(KeyboardInterrupt):
            hunter(flux, tmp_path / "parts", Stops(after), seen=first, **options).run()
        found = hunter(flux, tmp_path / "parts", seen=second, **options).run(resume=True)
        assert found == expected
        for name in ("log.json", "heads.json"):
            assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
        assert first + second == whole  # nothing is generated twice

    def test_a_longer_search_goes_on_from_a_shorter(self, flux, tmp_path):
        seen = []
        hunter(flux, tmp_path / "short", rounds=1).run()
        found = hunter(flux, tmp_path / "short", seen=seen).run(resume=True)
        assert found == hunter(flux, tmp_path / "long").run()
        assert all(len(heads) > 2 for heads, _ in seen)

    def test_an_earlier_search_is_not_overwritten(self, flux, tmp_path):
        hunter(flux, tmp_path).run()
        log = (tmp_path / "log.json").read_text()
        with pytest.raises(ValueError, match=r"log\.json is of an earlier search; resume it"):
            hunter(flux, tmp_path).run()
        changes = {
            "call": {"call": {"base": 60}},
            "pairs": {"pairs": [("a", 0)]},
            "top_k": {"top_k": 3},
            "perturbation": {"perturbation": {"strength": 0.5}},
            "objective": {"objective": darkness},
            "floors": {"floors": [(level, 1)]},
            "searched": {"heads": [(0, 0)]},
            "batch": {"batch": 1},
        }
        for key, change in changes.items():
            with pytest.raises(ValueError, match=f"a search with another `{key}`"):
                hunter(flux, tmp_path, **change).run(resume=True)
        assert (tmp_path / "log.json").read_text() == log


class TestTrials:
    def trials(self, flux, folder, *objectives, seen=None, **options):
        painter = partial(paint, seen=seen)
        painter.name = "paint"
        return Trials(flux.pipe, objectives, folder, generate=painter, **options)

    def test_images_are_kept_for_other_objectives(self, flux, tmp_path):
        seen, guidance = [], HeadPerturbation([(1, 0), (0, 0)])
        pairs = [Pair(*pair) for pair in PAIRS]
        first = self.trials(flux, tmp_path, level, seen=seen).score(guidance, pairs)
        assert [row["level"] for row in first] == pytest.approx([61, 62])
        again = self.trials(flux, tmp_path, darkness, level, seen=seen)
        assert again.score(HeadPerturbation([(0, 0), (1, 0)]), pairs) == [
            {"level": row["level"], "darkness": -row["level"]} for row in first
        ]
        assert len(seen) == 2

    def test_what_changes_images_makes_new_ones(self, flux, tmp_path):
        guidance, pair = HeadPerturbation([(1, 0)]), Pair("a", 0)
        others = [
            (None, pair),
            (HeadPerturbation([(1, 1)]), pair),
            (HeadPerturbation([(1, 0)], strength=0.5), pair),
            (guidance, Pair("b", 0)),
            (guidance, Pair("a", 1)),
        ]
        trials = self.trials(flux, tmp_path, level)
        trials.score(guidance, [pair])
        assert trials.image(guidance, pair).shape == (2, 2, 3)
        assert all(trials.image(*other) is None for other in others)
        assert self.trials(flux, tmp_path, level, call={"base": 1}).image(guidance, pair) is None
        dit_accel.enable(flux.pipe, Clear(3))
        assert self.trials(flux, tmp_path, level).image(guidance, pair) is None

    def test_models_are_told_apart(self, flux):
        same, changed = flux.make(), flux.make()
        assert fingerprint(same) == fingerprint(flux.pipe)
        with torch.no_grad():
            changed.transformer.proj_out.bias[0] += 1
        assert fingerprint(changed) != fingerprint(same)
        same.scheduler = type(same.scheduler)(shift=2.0)
        assert fingerprint(same) != fingerprint(flux.pipe)

    def test_videos_are_kept_frame_by_frame(self, flux, tmp_path):
        video = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6, 3), np.uint8)

        def film(pipe, prompts, seeds):
            return video[seeds] / 255

        def judge(images, prompts):
            return images.mean((1, 2, 3, 4))

        pairs = [Pair(*pair) for pair in PAIRS]
        trials = Trials(flux.pipe, [judge], tmp_path, generate=film)
        scores = [row[next(iter(row))] for row in trials.score(None, pairs)]
        assert scores == pytest.approx((video / 255).mean((1, 2, 3, 4)))
        for pair, frames in zip(pairs, video, strict=True):
            assert np.array_equal(trials.image(None, pair), frames)

    def test_scores_that_are_none(self, flux, tmp_path):
        def missing(images, prompts):
            return [1.0]

        def nan(images, prompts):
            return [float("nan")] * len(images)

        pairs = [Pair(*pair) for pair in PAIRS]
        for objective in (missing, nan):
            with pytest.raises(ValueError, match="must return a finite number for each image"):
                self.trials(flux, tmp_path, objective).score(None, pairs)
        broken = Trials(flux.pipe, [level], tmp_path, call={"base": float("nan")}, generate=paint)
        with pytest.raises(ValueError, match=r"with \[\(0, 0\)\] perturbed .* lower `scale`"):
            broken.score(HeadPerturbation([(0, 0)]), pairs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rounds": 0}, ValueError, "`rounds` must be at least 1, got 0"),
        ({"top_k": 0}, ValueError, "`top_k` must be at least 1, got 0"),
        ({"batch": 0}, ValueError, "`batch` must be at least 1, got 0"),
        ({"pairs": []}, ValueError, "`pairs` must be different"),
        ({"pairs": [("a", 0), ("a", 0)]}, ValueError, "`pairs` must be different"),
        ({"heads": []}, ValueError, "`heads` must be"),
        ({"heads": [(4, 0)]}, ValueError, r"`heads` must be .* of this model, got \(4, 0\)"),
        ({"perturbation": {"kind": "pag"}}, ValueError, "use kind='soft_pag'"),
        ({"perturbation": {"strength": 2}}, ValueError, "`strength` must be from 0 to 1"),
        ({"perturbation": {"strength": abs}}, ValueError, "cannot be written to a file"),
        ({"perturbation": {"modules": "attn2"}}, ValueError, "`heads` must be"),
        ({"objective": lambda images, prompts: []}, TypeError, "give .* an attribute `name`"),
        ({"call": {"base": torch.ones(1)}}, TypeError, "`call` must hold plain data"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_values(flux, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        hunter(flux, tmp_path, **options)
    assert not list(tmp_path.iterdir())


class TestFiles:
    def test_recipes_load_what_was_found(self, flux, tmp_path, monkeypatch):
        found = hunter(flux, tmp_path / "hunt", perturbation={"strength": 0.5}).run()
        (tmp_path / "recipe.yaml").write_text(
            "attention: {pattern: Clear, radius: 3}\nguidance: hunt/heads.json\n"
        )
        recipe = Recipe.load(tmp_path / "recipe.yaml")
        assert recipe == Recipe(Clear(3), guidance=found.perturbation)
        assert recipe.guidance == HeadPerturbation(found.best, strength=0.5, scale=8.0)
        assert dit_accel.enable(flux.pipe, tmp_path / "recipe.yaml").recipe == recipe
        monkeypatch.chdir(tmp_path / "hunt")
        assert (
            Recipe.from_dict({"attention": "Dense", "guidance": "heads.json"}).guidance == found.perturbation
        )
        with pytest.raises(ValueError, match=r"`guidance` names other\.json, and there is no such file"):
            Recipe.from_yaml("{attention: Dense, guidance: other.json}")

    def test_log(self, flux, tmp_path):
        found = hunter(flux, tmp_path).run()
        log = json.loads((tmp_path / "log.json").read_text())
        assert log["schema"] == "dit-accel/hunt/1"
        assert log["layers"] == ["double.0", "double.1", "single.0", "single.1"]
        assert [tuple(head) for head in log["heads"]] == list(found.heads)
        assert [tuple(head) for head in log["best"]] == list(found.best)
        assert log["rounds"][0]["chosen"] == [[1, 0], [2, 0]]
        assert [0, 0, {"level": pytest.approx(53.5)}] in log["rounds"][0]["means"]
        about = [json.loads(path.read_text()) for path in (tmp_path / "samples").glob("*.json")]
        assert sum(one["guidance"] is None for one in about) == len(PAIRS)

    def test_heat_map(self, flux, tmp_path):
        found = hunter(flux, tmp_path).run()
        figure = heat_map(found, tmp_path / "map.png")
        assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
        first, second = (panel.images[0].get_array().filled(np.nan) for panel in figure.axes[:2])
        assert first[1].tolist() == pytest.approx([8, 1], abs=1e-4)  # images are float32
        assert second[0].tolist() == pytest.approx([3, 15], abs=1e-4)
        assert np.isnan(second[1, 0])
        assert np.isnan(second[2, 0])  # chosen before

    def test_sheet(self, flux, tmp_path):
        search = hunter(flux, tmp_path, heads=[(1, 0), (1, 1), (2, 0)], rounds=1, top_k=1)
        found = search.run()

        def image(heads):
            small = search.trials.image(search.perturbation(heads), PAIRS[0])
            return None if small is None else small.repeat(32, axis=0).repeat(32, axis=1)

        sheet = effects_sheet(found, image)
        assert sheet.shape == (HEADER + 4 * 128, LABEL + 3 * 128, 3)
        middle = sheet[HEADER + 64 :: 128, LABEL + 64 :: 128, 0]
        assert middle.tolist() == [[50, 255, 255], [50, 58, 51], [50, 56, 255], [50, 255, 255]]
        corners = sheet[HEADER::128, LABEL::128].tolist()
        assert corners[1][1] == [214, 39, 40]  # (1, 0) was chosen
        assert corners[1][2] != [214, 39, 40]


# -- on a model ----------------------------------------------------------------------------------------------


def draw(run, pipe, prompts, seeds):
    """One step of a tiny model whose latents pass for pictures."""
    latents = torch.cat([run(pipe, grid=(2, 3), steps=1, seed=seed) for seed in seeds])
    return torch.sigmoid(latents)[..., :3].unflatten(1, (2, 3)).double().numpy()


def test_images_are_the_guided_pipelines(flux, tmp_path):
    def generate(pipe, prompts, seeds):
        return draw(flux.run, pipe, prompts, seeds)

    state = torch.get_rng_state()
    search = HeadHunter(flux.pipe, level, PAIRS, tmp_path, rounds=1, top_k=2, generate=generate)
    found = search.run()
    assert torch.equal(torch.get_rng_state(), state)
    assert dit_accel.handle_of(flux.pipe) is None
    for heads in ((), ((2, 1),), found.heads):
        guidance = HeadPerturbation(heads, scale=8.0) if heads else None
        with dit_accel.accelerated(flux.pipe, Recipe(Clear(99), guidance=guidance)):
            expected = generate(flux.pipe, *zip(*PAIRS, strict=True))
        for pair, image in zip(PAIRS, expected, strict=True):
            kept = search.trials.image(search.perturbation(heads), Pair(*pair))
            assert np.abs(kept / 255 - image).max() <= 0.51 / 255
    best = max(found.rounds[0].means, key=lambda head: found.rounds[0].means[head]["level"])
    assert found.heads[0] == best


SCRIPT = """
import json, pathlib, runpy, sys
import torch
torch.set_num_threads(1)
tests, out = sys.argv[1:]
tools = runpy.run_path(f"{tests}/conftest.py")
here = runpy.run_path(f"{tests}/dit_accel/guidance/test_hunter.py")
from accelerate import PartialState
from dit_accel.guidance import HeadHunter
def generate(pipe, prompts, seeds):
    return here["draw"](tools["run_flux"], pipe, prompts, seeds)
search = HeadHunter(tools["make_flux"](), here["level"], here["PAIRS"], out, rounds=2, top_k=2, batch=1,
                    generate=generate)
score, count = search.trials.score, []
search.trials.score = lambda guidance, pairs: count.append(pairs) or score(guidance, pairs)
found = search.run()
state = PartialState()
result = {"processes": state.num_processes, "share": len(count), "heads": found.heads}
pathlib.Path(out, f"result-{state.process_index}.json").write_text(json.dumps(result))
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does(flux, tmp_path):
    """`accelerate launch` on two CPU processes: the work is shared, log and images are those of one."""
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "--main_process_port", "0", tmp_path / "script.py", ROOT / "tests", tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def generate(pipe, prompts, seeds):
        return draw(flux.run, pipe, prompts, seeds)

    one = HeadHunter(flux.pipe, level, PAIRS, tmp_path / "one", rounds=2, top_k=2, batch=1, generate=generate)
    found = one.run()
    results = [json.loads((tmp_path / "two" / f"result-{rank}.json").read_text()) for rank in range(2)]
    assert [result["processes"] for result in results] == [2, 2]
    assert all(result["heads"] == json.loads(json.dumps(found.heads)) for result in results)
    shares = [result["share"] for result in results]
    assert sum(shares) == 2 * (1 + 8 + 1 + 6 + 1)
    assert max(shares) - min(shares) <= 5
    logs = [json.loads((tmp_path / name / "log.json").read_text()) for name in ("one", "two")]
    assert all(log["settings"].pop("generate") for log in logs)  # where the two are defined
    assert logs[0] == logs[1]
