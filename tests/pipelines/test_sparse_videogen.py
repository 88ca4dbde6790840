"""Sparse VideoGen's online choice of heads in Wan and HunyuanVideo transformers."""

import dataclasses

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.attention.head_ordered import HeadOrdered
from dit_accel.patterns import Neighborhood, SparseVideoGen
from dit_accel.pipelines import family_of
from dit_accel.recipe.recipe import Recipe, presets
from dit_accel.runtime.switching import accelerated, disable, enable, handle_of
from dit_accel.summary import summary

GRID = (4, 4, 6)
SVG = {
    "wan": SparseVideoGen(0.4, True, True, block_size=8, profile_frames=2),
    "hunyuan": SparseVideoGen(0.5, block_size=8, profile_frames=1.5),
}
NEAR = Neighborhood((3, 3, 3))


@pytest.fixture(params=SVG)
def family(request):
    return request.param


@pytest.fixture
def models(request, family):
    return request.getfixturevalue(family)


@pytest.fixture
def attended(monkeypatch):
    """What every layer that chose was given and what it chose, in order of the calls."""
    records, attend = [], HeadOrdered.__call__

    def recorded(self, call):
        out = attend(self, call)
        temporal = call.notes["temporal heads"]
        records.append((self, (call.q, call.k, call.v), self.sample(call.step), call.text_valid, temporal))
        return out

    monkeypatch.setattr(HeadOrdered, "__call__", recorded)
    return records


def make(models, **config):
    """A pipeline whose heads attend to something: random weights alone give nearly uniform attention."""
    pipe = models.make(**config)
    generator = torch.Generator().manual_seed(3)
    for module in family_of(pipe.transformer).layers(pipe.transformer).values():
        for norm in (module.norm_q, module.norm_k):
            norm.weight.data.normal_(std=2, generator=generator)
    return pipe


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def smallest_error(choice, tensors, sample, text_valid) -> tuple[torch.Tensor, float]:
    """The definition in float64, for one layer; and how far from equal the closest two errors are."""
    q, k, v = (x.double() for x in tensors)
    (batch, heads), dim, layout = q.shape[:2], q.shape[3], choice.layout
    masks = torch.ones(2, len(sample.at), layout.seq_len, dtype=torch.bool)
    pattern, places = choice.pattern, choice.pattern.places(layout)
    masks[:, :, : layout.visual_len] = pattern.coarse_masks(layout, places, sample.at)
    temporal, margins = torch.zeros(batch, heads, dtype=torch.bool), []
    for b in range(batch):
        seen = torch.ones(layout.seq_len, dtype=torch.bool)
        if text_valid is not None:
            seen[layout.visual_len + int(text_valid[b]) :] = False
        for h in range(heads):
            scores = q[b, h, sample.at] @ k[b, h].T / dim**0.5
            full, spatial, other = (
                scores.where(mask & seen, -torch.inf).softmax(1) @ v[b, h]
                for mask in (torch.ones_like(seen), *masks)
            )
            errors = [float((out - full).square().mean()) for out in (spatial, other)]
            temporal[b, h] = errors[1] < errors[0]
            margins.append(abs(errors[0] - errors[1]) / max(errors))
    return temporal, min(margins)


class TestChoice:
    def test_is_the_smaller_error_in_float64(self, models, family, attended):
        pipe = make(models)
        with accelerated(pipe, SVG[family]):
            models.run(pipe, grid=GRID, steps=2, batch=2, cfg=3.0)
        kinds = torch.stack([temporal for *_, temporal in attended])
        assert 0.1 < kinds.double().mean() < 0.9
        for choice, tensors, sample, text_valid, temporal in attended:
            exact, margin = smallest_error(choice, tensors, sample, text_valid)
            assert margin > 1e-5  # no head whose kind is a matter of rounding
            assert torch.equal(temporal, exact)

    def test_is_the_same_in_every_run(self, models, family, attended):
        pipe, outputs = make(models), []
        with accelerated(pipe, SVG[family]):
            for seed in (1, 2):
                torch.manual_seed(seed)
                outputs.append(models.run(pipe, grid=GRID, steps=3))
                assert torch.initial_seed() == seed
        first, second = attended[: len(attended) // 2], attended[len(attended) // 2 :]
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a[2].at, b[2].at)
            assert torch.equal(a[4], b[4])
        assert torch.equal(*outputs)

    def test_guidance_in_one_batch_is_guidance_in_two_calls(self, models, family, attended):
        pipe = make(models)
        inputs = models.inputs(pipe)
        names = [name for name, x in inputs.items() if isinstance(x, torch.Tensor)]
        generator = torch.Generator().manual_seed(5)
        other = {n: torch.randn(inputs[n].shape, generator=generator) for n in ("encoder_hidden_states",)}
        branches = [inputs, inputs | other]
        handle = enable(pipe.transformer, SVG[family])
        with torch.no_grad():
            apart = [pipe.transformer(**branch)[0] for branch in branches]
            one_by_one, attended[:] = list(attended), []
            handle.begin(1)
            both = {name: torch.cat([branch[name] for branch in branches]) for name in names}
            close(pipe.transformer(**inputs | both)[0], torch.cat(apart))
        layers = len(attended)
        for i, record in enumerate(attended):
            assert torch.equal(record[4], torch.cat([one_by_one[i][4], one_by_one[layers + i][4]]))

    def test_compiled_blocks_are_whole_graphs(self, wan):
        pipe = make(wan)
        enable(pipe, SVG["wan"])
        expected = wan.run(pipe, grid=GRID, steps=2)
        for block in pipe.transformer.blocks:
            block.compile(fullgraph=True, backend="eager")
        close(wan.run(pipe, grid=GRID, steps=2), expected)


class TestRecipes:
    def test_disable_is_bit_identical(self, models, family):
        pipe = make(models)
        dense = models.run(pipe, grid=GRID)
        with accelerated(pipe, SVG[family]):
            assert not torch.allclose(models.run(pipe, grid=GRID), dense)
        assert torch.equal(models.run(pipe, grid=GRID), dense)

    def test_dense_steps_and_layers(self, models, family, attended):
        pipe = make(models)
        with accelerated(pipe, Recipe(SVG[family], dense_steps=2, dense_layers=1)) as handle:
            models.run(pipe, grid=GRID, steps=3)
        layers = list(family_of(pipe.transformer).layers(pipe.transformer))
        assert len(attended) == len(layers) - 1
        assert handle.stats()["dense_steps"] == [0, 1]
        assert list(handle.stats()["temporal_heads"]["transformer"]) == layers[1:]

    def test_summary_says_what_was_chosen(self, models, family, attended):
        pipe = make(models)
        enable(pipe, SVG[family])
        assert all(not row["note"] for row in summary(pipe).rows)
        models.run(pipe, grid=GRID, steps=2, cfg=3.0)
        shares = list(handle_of(pipe).stats()["temporal_heads"]["transformer"].values())
        assert shares == [float(temporal.double().mean()) for *_, temporal in attended[-len(shares) :]]
        assert len(set(shares)) > 1
        notes = [row["note"] for row in summary(pipe).rows]
        assert notes == [f"{share:.0%} temporal heads in the latest call" for share in shares]
        density = SVG[family].density(attended[-1][0].layout)
        assert [row["density"] for row in summary(pipe).rows] == [pytest.approx(density)] * len(shares)

    def test_images_are_refused(self, models, family):
        pipe = make(models)
        dense = models.run(pipe, grid=(1, 4, 6))
        enable(pipe, Recipe(SVG[family], dense_steps=2))
        with pytest.raises(
            ValueError, match=r"grid \(1, 4, 6\) has one frame; use another pattern for images"
        ):
            models.run(pipe, grid=(1, 4, 6))
        disable(pipe)
        assert torch.equal(models.run(pipe, grid=(1, 4, 6)), dense)

    def test_two_settings_in_one_layer_are_refused(self, models, family):
        pipe = make(models)
        other = dataclasses.replace(SVG[family], keep=0.9)
        with pytest.raises(ValueError, match=r"heads of layer .*\.0 choose by content in two ways"):
            enable(pipe, Recipe({"all": SVG[family], "heads.0": other}))
        assert handle_of(pipe) is None


@pytest.mark.parametrize("image_family", ["flux", "sd3"])
def test_image_families_are_refused(request, image_family):
    models = request.getfixturevalue(image_family)
    enable(models.pipe, SparseVideoGen(0.6, block_size=8))
    with pytest.raises(ValueError, match=r"grid \(1, 8, 12\) has one frame; use another pattern for images"):
        models.run(models.pipe)


def test_too_small_videos_are_refused_before_the_first_step(wan):
    enable(wan.pipe, Recipe(SparseVideoGen(0.4, inclusive=True), dense_steps=2))
    with pytest.raises(ValueError, match=r"`profile_frames` 1.5 on grid \(4, 4, 6\) is less than one block"):
        wan.run(wan.pipe, grid=GRID)


def test_presets(wan, hunyuan):
    """The papers' constants, at the papers' geometry."""
    svg, layout = presets("wan")["wan-svg"], TokenLayout((21, 30, 52))
    assert svg.attention.spatial.frames(layout) == pytest.approx(2.81347, abs=1e-5)
    assert (svg.attention.coarse_reach(layout), svg.attention.first_frame_sink) == (24, True)
    assert [svg.is_dense_step(i, 50) for i in (9, 10)] == [True, False]
    hv, layout = presets("hunyuan-video")["hunyuan-video-svg"], TokenLayout((33, 45, 80), 256)
    assert hv.attention.spatial.frames(layout) == pytest.approx(4.34869, abs=1e-5)
    assert (hv.attention.coarse_reach(layout), hv.attention.first_frame_sink) == (42, False)
    assert [hv.is_dense_step(i, 50) for i in (4, 5)] == [True, False]
    for models, recipe in ((wan, svg), (hunyuan, hv)):
        assert (recipe.dense_layers, recipe.attention.rows) == (2, 64)
        enable(models.pipe, recipe)
        assert [row["note"] == "" for row in summary(models.pipe).rows][:3] == [False, False, True]
