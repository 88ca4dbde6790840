"""HeadHunter: the search on painted images, then on a real tiny model."""

import inspect
import json

import numpy as np
import pytest
import torch
from painted_heads import ALONE, PAIRS, darkness, draw, hunter, level, paint

import dit_accel
from dit_accel.guidance import HeadHunter, HeadPerturbation
from dit_accel.guidance.trials import Pair
from dit_accel.patterns import Clear
from dit_accel.recipe.recipe import Recipe


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


class TestRefused:
    """Before anything is generated."""

    @pytest.mark.parametrize("minimum", [float("nan"), float("inf"), -float("inf")])
    def test_floors_that_are_no_numbers(self, flux, tmp_path, minimum):
        with pytest.raises(ValueError, match="the minimum of level in `floors` must be a finite number"):
            hunter(flux, tmp_path, floors=[(level, minimum)])

    @pytest.mark.parametrize("seed", [-1, 2**64])
    def test_seeds_out_of_range(self, flux, tmp_path, seed):
        with pytest.raises(ValueError, match="a seed must be from 0"):
            hunter(flux, tmp_path, pairs=[("a", 0), ("a", seed)])

    @pytest.mark.parametrize(
        "options", [{"strength": float("nan")}, {"scale": float("inf")}, {"kind": "none"}]
    )
    def test_options_of_the_perturbation(self, flux, tmp_path, options):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
            hunter(flux, tmp_path, perturbation=options)
        assert not list(tmp_path.iterdir())


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


class TestWritten:
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
        with pytest.raises(
            ValueError, match=r"`guidance` names 'other\.json', and there is no file other\.json"
        ):
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
