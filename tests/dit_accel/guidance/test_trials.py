"""Trials: images and scores that are made once, and told apart by all that makes them."""

from functools import partial

import numpy as np
import pytest
import torch
from painted_heads import PAIRS, darkness, level, paint

import dit_accel
from dit_accel.guidance import HeadPerturbation
from dit_accel.guidance.trials import Pair, Trials, fingerprint
from dit_accel.patterns import Clear


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
