"""`dit_accel.calibrate` on every family: what it measures, what it refuses, how it goes on when stopped."""

from unittest import mock

import pytest
import torch
from pipeline_arguments import arguments_of

import dit_accel
from dit_accel import Calibration, Recipe
from dit_accel.calibration.error_pass import ErrorPass, Option, options
from dit_accel.calibration.mass_pass import MassPass
from dit_accel.calibration.passes import Runs
from dit_accel.calibration.picture import draw_choices
from dit_accel.errors import UnavailableError
from dit_accel.kernels import block_sparse_attention
from dit_accel.patterns import Calibrated, Clear, Neighborhood
from dit_accel.patterns.calibration import REORDERED
from dit_accel.pipelines import family_of

IMAGES = ("flux", "hunyuanimage", "zimage", "flux2", "sd3", "qwen")
FAMILIES = (
    "flux",
    "sd3",
    "wan",
    "hunyuan",
    "hunyuan15",
    "skyreels",
    "hunyuanimage",
    "zimage",
    "qwen",
    "flux2",
)
SMALL = {"density": 0.4, "block_size": 16}


@pytest.fixture
def prompts(families):
    """Arguments of calls of a family's pipeline, with guidance."""

    def make(name, pipe, steps=3, **options):
        grid = (8, 12) if name in IMAGES else (3, 6, 8)
        tools = families[name]
        return [arguments_of(tools, pipe, grid=grid, steps=steps, cfg=3.0, seed=s, **options) for s in (0, 1)]

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(families, prompts, name, tmp_path):
    """It is calibrated, saved, loaded, enabled and run; the pipeline is as it was in between."""
    tools = families[name]
    pipe = tools.make()
    given = prompts(name, pipe)
    size = {"grid": given and ((8, 12) if name in IMAGES else (3, 6, 8)), "steps": 3}
    before = tools.run(pipe, **size)
    found = dit_accel.calibrate(pipe, given, candidates=("reordered", Clear(2)), **SMALL)
    assert torch.equal(tools.run(pipe, **size), before)
    assert found.heads == family_of(pipe.transformer).heads(pipe.transformer)[0]
    assert found.steps == 3
    assert set(found.counts()) - {"Dense"}
    found.save(tmp_path / "found.safetensors")
    with dit_accel.accelerated(pipe, Recipe(Calibrated(Calibration.load(tmp_path / "found.safetensors")))):
        after = tools.run(pipe, **size)
        assert dit_accel.summary(pipe).rows[0]["pattern"]
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    draw_choices(found)


def test_blocks_alone_are_one_order_for_each_head(families, prompts):
    pipe = families["wan"].make()
    found = dit_accel.calibrate(pipe, prompts("wan", pipe), **SMALL)
    assert (found.chosen == REORDERED).all()
    assert (found.order == found.order[:1]).all()
    assert not found.tail.any()
    shares = [
        float(found.choices(layer, head)[row].pattern.table.double().mean())
        for layer in range(3)
        for head in range(2)
        for row in range(found.rows)
    ]
    assert shares == [pytest.approx(round(0.4 * 81) / 81)] * len(shares)
    spread = dit_accel.calibrate(pipe, prompts("wan", pipe), budget="global", **SMALL)
    counts = [spread.choices(layer, head)[0].pattern.table.sum() for layer in range(3) for head in range(2)]
    assert sum(counts) == round(0.4 * 81 * 6)


def test_dense_density_is_dense(families, prompts):
    """With a density of 1 heads compute what they always do."""
    tools = families["wan"]
    pipe = tools.make()
    found = dit_accel.calibrate(pipe, prompts("wan", pipe), density=1, block_size=16)
    before = tools.run(pipe, steps=3)
    with dit_accel.accelerated(pipe, Calibrated(found)):
        assert torch.allclose(tools.run(pipe, steps=3), before, atol=1e-4)


def test_errors_and_costs_are_those_of_the_heads(families, prompts):
    """Of each option, against a kernel call on the whole layer, from tensors that a hook kept."""
    pipe = families["hunyuan"].make()
    given = prompts("hunyuan", pipe, steps=1)[:1]
    settings = {"block_size": 16, "stretches": 10, "queries": None, "seed": 0}
    runs = Runs(pipe, given, 0, {}, None, False, settings)
    found = MassPass(settings, 1 << 30).over(runs)
    tried = [*options([Clear(2)], reordered=False, tails=True), Option(rank=1, density=0.3)]
    measured, seen = ErrorPass(found, tried), []
    see = measured.see

    def kept(handle, layer, call, out):
        seen.append((layer, call, out))
        see(handle, layer, call, out)

    with mock.patch.object(measured, "see", kept):
        runs.do(measured)
    layer = seen[1][0]
    index = found.model["layers"].index(layer)
    calls = [(one, result) for name, one, result in seen if name == layer]
    for number, option in enumerate(tried):
        lost, whole = torch.zeros(2, dtype=torch.float64), []
        for one, result in calls:
            choices = [measured.choice(option, 0, index, head) for head in range(2)]
            outs = []
            for head, choice in enumerate(choices):
                mask = choice.pattern.block_mask(one.layout, (64, 16), "raster")
                order = torch.arange(one.layout.seq_len) if mask.order is None else mask.order
                parts = [x[:, head : head + 1, order] for x in (one.q, one.k, one.v)]
                tail = "pooled" if option.tail and mask.order is None else None
                attended = block_sparse_attention(*parts, mask, text_valid=one.text_valid, tail=tail)
                outs.append(attended[:, 0, torch.argsort(order)].double())
            squares = (torch.stack(outs, 1) - result.double()).square().sum((2, 3))
            lost += (squares / result.double().square().sum((1, 2, 3))[:, None]).mean(0)
            whole.append(result)
        if not option.tail:  # which pools by the order of the blocks
            assert torch.allclose(measured.mean_errors[0, index, :, number], lost / len(calls), rtol=1e-4)
            cost = measured.costs[0, index, :, number]
            assert (cost > 0).all()
            assert (cost <= 1).all()
    plain, tailed = measured.mean_errors[..., 0], measured.mean_errors[..., 1]
    assert not torch.equal(plain, tailed)
    assert (measured.costs[..., 1] > measured.costs[..., 0]).all()


def test_the_choice_is_no_worse_than_one_for_all(families, prompts):
    """By the errors that were measured, at no more cost than each of the patterns alone has."""
    pipe = families["wan"].make()
    settings = {"block_size": 16, "stretches": 10, "queries": None, "seed": 0}
    runs = Runs(pipe, prompts("wan", pipe), 0, {}, None, False, settings)
    found = MassPass(settings, 1 << 30).over(runs)
    measured = ErrorPass(found, options([Neighborhood((3, 3, 3)), Clear(2)], reordered=True, tails=True))
    runs.do(measured)
    from dit_accel.calibration.mixing import chosen_by

    for number, option in enumerate(measured.options):
        alone = float(measured.mean_errors[..., number].mean())
        budget = float(measured.costs[..., number].mean())
        about = chosen_by(measured, budget, {}).about
        assert about["cost"] <= budget + 1e-9, option
        assert about["error"] <= alone + 1e-12, option


class Stopped(Exception):
    pass


def test_it_goes_on_where_it_was_stopped(families, prompts, tmp_path):
    pipe = families["flux"].make()
    given, options = prompts("flux", pipe), {**SMALL, "candidates": ("reordered", Clear(2))}
    expected = dit_accel.calibrate(pipe, given, **options)
    runs, run = [], Runs._run

    def stops(self, one, number):
        runs.append((one.name, number))
        if len(runs) in (2, 4):
            raise Stopped
        run(self, one, number)

    with mock.patch.object(Runs, "_run", stops):
        for _ in range(2):
            with pytest.raises(Stopped):
                dit_accel.calibrate(pipe, given, folder=tmp_path, **options)
        found = dit_accel.calibrate(pipe, given, folder=tmp_path, **options)
    mass, errors = [("mass", 0), ("mass", 1), ("mass", 1)], [("errors", 0), ("errors", 0), ("errors", 1)]
    assert runs == mass + errors
    assert found == expected
    with mock.patch.object(Runs, "_run", stops):  # another density needs no run
        dit_accel.calibrate(pipe, given, folder=tmp_path, **{**options, "density": 0.6})
    assert runs == mass + errors
    with pytest.raises(ValueError, match="was begun with another `seed`, 0, not 1; use"):
        dit_accel.calibrate(pipe, given, folder=tmp_path, seed=1, **options)
    (tmp_path / "mass.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a safetensors file"):
        dit_accel.calibrate(pipe, given, folder=tmp_path, **options)


def test_seeds_decide(families, prompts):
    pipe = families["wan"].make()
    given = prompts("wan", pipe)[:1]
    first, again, other = (dit_accel.calibrate(pipe, given, seed=seed, **SMALL) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    some = [dit_accel.calibrate(pipe, given, queries=40, **SMALL) for _ in range(2)]
    assert some[0] == some[1]
    assert some[0] != first


def test_two_transformers_share_a_run(families, prompts):
    """Wan 2.2: each of them has the rows of its own steps."""
    pipe = families["wan"].make(two=True)
    found = dit_accel.calibrate(pipe, prompts("wan", pipe, steps=4), **SMALL)
    assert found.rows == 3
    with dit_accel.accelerated(pipe, Calibrated(found)) as handle:
        families["wan"].run(pipe, steps=4, cfg=3.0)
    assert handle.stats()["step_densities"][3] < 1


def test_what_is_refused(families, prompts):
    pipe = families["wan"].make()
    given = prompts("wan", pipe)
    for values, message in (
        ({"density": 0}, "`density` must be a number above 0"),
        ({"budget": "layer"}, "`budget` must be 'head' or 'global', got 'layer'"),
        ({"block_size": 0}, "`block_size` must be a positive integer"),
        ({"queries": 0}, "`queries` must be a positive integer"),
        ({"candidates": ()}, "`candidates` must name at least one"),
        ({"candidates": ("Spiral",)}, "a candidate must be 'reordered'"),
        ({"most_bytes": 1000}, "take .* GiB, more than `most_bytes`"),
    ):
        with pytest.raises(ValueError, match=message):
            dit_accel.calibrate(pipe, given, **{**SMALL, **values})
    with pytest.raises(ValueError, match="`prompts` must have at least one"):
        dit_accel.calibrate(pipe, [], **SMALL)
    other_steps = [given[0], {**given[1], "num_inference_steps": 4}]
    with pytest.raises(ValueError, match="a run has 4 steps, the first had 3"):
        dit_accel.calibrate(pipe, other_steps, **SMALL)
    other_size = [given[0], {**given[1], "height": 128}]
    with pytest.raises(ValueError, match="all of a calibration is at one size"):
        dit_accel.calibrate(pipe, other_size, **SMALL)
    found = dit_accel.calibrate(pipe, given, **SMALL)
    with dit_accel.accelerated(pipe, Calibrated(found)):
        with pytest.raises(ValueError, match="made for runs of 3 steps, and this one has 4; calibrate at"):
            families["wan"].run(pipe, steps=4)
        with pytest.raises(ValueError, match=r"made for grid \(3, 6, 8\), got \(3, 6, 6\)"):
            families["wan"].run(pipe, steps=3, grid=(3, 6, 6))
    with dit_accel.accelerated(pipe, Calibrated(found, rescale=True)):
        assert families["wan"].run(pipe, steps=4, grid=(3, 6, 6)).isfinite().all()
    with pytest.raises(ValueError, match="made for the family 'wan', and this is a model of 'flux'"):
        dit_accel.enable(families["flux"].make(), Calibrated(found))


def test_chunks_that_see_no_frames_to_come_are_refused(families):
    """Before a run: by the argument of the call, or as the model is set."""
    pipe = families["skyreels"].make(pipeline="SkyReelsV2DiffusionForcingPipeline")
    reason = r"`causal_block_size` 3\); calibrate with causal_block_size=1 and tails=False"
    with pytest.raises(UnavailableError, match=reason):
        dit_accel.calibrate(pipe, "a circle", density=0.3, causal_block_size=3)
    pipe.transformer._set_ar_attention(3)
    with pytest.raises(UnavailableError, match=reason):
        dit_accel.calibrate(pipe, "a circle", density=0.3)
