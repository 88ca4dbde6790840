"""Every pattern in every family, in every form of call, against the same transformer under dense masks.

Each call that an accelerated transformer gets is repeated by diffusers' own attention under token masks, in
fp32 and in fp64. The fp64 rule: the error against fp64 is at most twice that of fp32, plus a few roundings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import calibrations
import pytest
import torch
from call_forms import Model
from mask_oracle import Oracle, PatternOf, recorded

from dit_accel import TokenLayout, patterns, pipelines
from dit_accel.layer_names import flat_indices
from dit_accel.patterns import (
    Agent,
    ByNoise,
    Calibrated,
    ChunkCausal,
    ChunkGrowth,
    Clear,
    Clustered,
    Dense,
    InLine,
    InwardWindow,
    LocalGlobal,
    Neighborhood,
    Pattern,
    Radial,
    Rectified,
    Routed,
    ShiftedWindow,
    Skipping,
    SlidingTile,
    SparseLinear,
    SparseVideoGen,
    SpatialHead,
    TemporalHead,
    VideoSparse,
)
from dit_accel.pipelines import family_of, load, tiny
from dit_accel.recipe.recipe import Recipe, presets

MODELS = {  # family, configuration, what it makes
    "flux": ("flux", {}, "image"),
    "chroma": ("chroma", {}, "image"),
    "flux2": ("flux2", {}, "image"),
    "sd3": ("sd3", {}, "image"),
    "sd3.5": ("sd3", {"dual_attention_layers": (0, 2), "qk_norm": "rms_norm"}, "image"),
    "hunyuanimage": ("hunyuanimage", {}, "image"),
    "qwen": ("qwen", {}, "image"),
    "zimage": ("zimage", {}, "image"),
    "wan": ("wan", {}, "video"),
    "skyreels": ("skyreels", {}, "video"),
    "hunyuan": ("hunyuan", {}, "video"),
    "hunyuan15": ("hunyuan15", {}, "video"),
    "ltx": ("ltx", {}, "video"),
    "ltx2": ("ltx2", {}, "video"),
    "cogvideox": ("cogvideox", {}, "video"),
    "mochi": ("mochi", {}, "video"),
    "animate": ("animate", {}, "video"),
    "chrono": ("chrono", {}, "video"),
    "helios": ("helios", {}, "video"),
    "minimaxh3": ("minimaxh3", {}, "video"),
}
ELSEWHERE = {
    "anyflow-far": "its calls have keys of a cache: families/test_anyflow_far.py",
    "kandinsky-5": "its queries and keys are in bf16 in every dtype: families/test_kandinsky5.py",
}
SIZES = {"image": ((8, 12), (6, 14)), "video": ((4, 4, 6), (3, 5, 7))}  # in tokens


class Mixture(NamedTuple):
    """A recipe's selectors, and what they are to mean."""

    attention: dict[str, Pattern]
    pattern_of: PatternOf


def mixtures(a: Pattern, b: Pattern) -> dict[str, Mixture]:
    def some_heads(layer: int, head: int) -> Pattern:
        return a if layer == 0 else b if (layer, head) == (1, 0) else Dense()

    return {
        "layers": Mixture({"all": a, "1": b}, lambda layer, head: b if layer == 1 else a),
        "heads": Mixture({"all": a, "heads.1": b}, lambda layer, head: b if head == 1 else a),
        "heads-of-a-layer": Mixture({"0": a, "1/heads.0": b, "2": Dense()}, some_heads),
    }


BOTH = {
    "clear": Clear(3),
    "inward-window": InwardWindow((1, 2)),
    "shifted-window": ShiftedWindow((2, 2), shift=(1, 2)),
    "local-global": LocalGlobal((3, 4)),
    "local-global-sliding": LocalGlobal(3, sliding=True),
    "neighborhood": Neighborhood((3, 5)),
    "neighborhood-stride": Neighborhood(3, stride=2),
    "spatial-head": SpatialHead(0.5, block_size=8),
    "chunk-causal": ChunkCausal(2, Neighborhood(3)),
    "by-noise": ByNoise({0.5: InwardWindow((1, 2)), 0: Dense()}),
}
ADAPTIVE = SparseVideoGen(0.5, block_size=8)
ROUTED = Routed(top_p=0.4, crossing=True, similarity=0.05, block_size=(16, 16))
CHOSEN = {
    "routed": ROUTED,
    "routed-antidiagonal": Routed(top_k=0.3, score="antidiagonal", stride=4, block_size=(16, 16)),
    "routed-union": Routed(top_k=0.2, union=SlidingTile((1, 1, 1), (1, 2, 2)), block_size=(16, 16)),
    "sparse-linear": SparseLinear(0.3, block_size=(16, 16)),  # what an adapter adds: test_sparse_linear.py
    "video-sparse": VideoSparse(0.3, (2, 4, 2)),  # without a gate: test_video_sparse.py
    "clustered": Clustered(6, 8, 0.3, 0.1, (3, 1)),
    "routed-heads": Mixture(
        {"all": Neighborhood(3), "heads.1": ROUTED},
        lambda layer, head: ROUTED if head == 1 else Neighborhood(3),
    ),
}
CASES: dict[str, dict[str, Pattern | Mixture]] = {
    "image": {
        **BOTH,
        **CHOSEN,
        "neighborhood-dilation": Neighborhood((3, 4), dilation=(2, 3)),
        "neighborhood-causal": Neighborhood((3, 5), is_causal=(True, False)),
        "sliding-tile": SlidingTile((1, 1, 3), (1, 2, 3)),
        **mixtures(Clear(3), Neighborhood((3, 5))),
    },
    "video": {
        **BOTH,
        **CHOSEN,
        "chunk-growth": ChunkGrowth(1, 0.3, 0.1, top_frames=1, block_size=(16, 16)),
        "neighborhood-dilation": Neighborhood((3, 2, 3), dilation=(1, 2, 2)),
        "neighborhood-causal": Neighborhood((2, 3, 3), is_causal=(True, False, False)),
        "sliding-tile": SlidingTile((1, 3, 1), (2, 2, 2)),
        "radial": Radial(0.2, block_size=16),
        "radial-exact-sink": Radial(0.2, block_size=4, first_frame_sink=True, exact=True),
        "spatial-head-sink": SpatialHead(0.5, True, True, block_size=8),
        "temporal-head": TemporalHead(0.5, block_size=8),
        "temporal-head-sink": TemporalHead(0.5, True, True, block_size=8),
        "sparse-videogen": ADAPTIVE,
        "sparse-videogen-sink": SparseVideoGen(0.5, True, True, block_size=8, profile_frames=2),
        **mixtures(Neighborhood((3, 3, 3)), Radial(0.2, block_size=16)),
        "heads-that-choose": Mixture(
            {"all": Neighborhood((3, 3, 3)), "heads.1": ADAPTIVE},
            lambda layer, head: ADAPTIVE if head == 1 else Neighborhood((3, 3, 3)),
        ),
    },
}
EXCLUDED = {
    ("image", Radial): "in one frame everything is near: it is dense",
    ("image", TemporalHead): "in one frame places are raster order: it is SpatialHead",
    ("image", Rectified): "is more than a mask: dit_accel/patterns/test_rectified.py",
    ("video", Rectified): "is more than a mask: dit_accel/patterns/test_rectified.py",
    ("image", Agent): "is no mask: dit_accel/patterns/test_maskless.py",
    ("video", Agent): "is no mask: dit_accel/patterns/test_maskless.py",
    ("image", InLine): "is no mask: dit_accel/patterns/test_maskless.py",
    ("video", InLine): "is no mask: dit_accel/patterns/test_maskless.py",
    ("image", Calibrated): "is for one model and size: test_calibrations_of_every_family",
    ("video", Calibrated): "is for one model and size: test_calibrations_of_every_family",
    ("image", Skipping): "computes all in one step: dit_accel/attention/test_skipping.py",
    ("video", Skipping): "computes all in one step: dit_accel/attention/test_skipping.py",
    ("image", ChunkGrowth): "sees one frame in full: it is dense",
    ("image", SparseVideoGen): "refuses one frame, as there would be nothing to choose",
}


TOO_SMALL = {("zimage", "spatial-head")}  # a caption of 32 tokens is more than such a head keeps
FORMS = {  # samples of each call
    "cfg_in_one_batch": [2],
    "cfg_in_two_calls": [1, 1],
    "batch": [2],
    "changed_size": [1, 1, 1],
}


@pytest.fixture(scope="module")
def models(families, masked) -> Callable[[str], Model]:
    """By name, each made once."""

    def make(name: str) -> Model:
        family, config, kind = MODELS[name]
        return Model(families[family], config, SIZES[kind], masked)

    return cache(make)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name, (*_, kind) in MODELS.items()
        for case in CASES[kind]
        if (name, case) != ("cogvideox", "by-noise")  # it is no flow
        if (name, case) not in TOO_SMALL
    ],
)
def test_matches_dense_attention_under_masks(models, name, case, form):
    """In an order that moves the tokens."""
    model = models(name)
    case = CASES[MODELS[name][2]][case]
    attention, pattern_of = case if isinstance(case, Mixture) else (case, lambda layer, head: case)
    recipe = Recipe(attention, order="hilbert", block_size=(16, 16))
    calls = recorded(model.pipe, recipe, getattr(model, form))
    assert [len(call.output) for call in calls] == FORMS[form]
    sizes = [model.sizes[0]] * len(calls)
    if form == "changed_size":
        assert torch.equal(calls.pop().output, calls[0].output)  # back at the first size
        sizes = model.sizes
    for call, grid in zip(calls, sizes, strict=True):
        model.oracle.check(call, grid, pattern_of)


@pytest.mark.parametrize("form", ["cfg_in_one_batch", "cfg_in_two_calls", "batch", "steps"])
@pytest.mark.parametrize("name", MODELS)
def test_calibrations_of_every_family(models, name, form):
    """Blocks along the axes and windows, another choice in every head and, in four steps, in two of them."""
    model, transformer = models(name), models(name).pipe.transformer
    names, grid = list(family_of(transformer).layers(transformer)), (1, *model.sizes[0])[-3:]
    calibration = calibrations.drawn(
        grid,
        family=family_of(transformer).name,
        layers=tuple(names),
        heads=family_of(transformer).heads(transformer)[0],
        head_dim=family_of(transformer).heads(transformer)[1],
        steps=4 if form == "steps" else 1,
        patterns=(Neighborhood((3, 5)), Clear(2)),
        tails=False,
    )
    twins = [names.index(one.removesuffix(".attn2")) for one in names]  # the oracle asks by flat index
    calibration = dataclasses.replace(
        calibration, **{n: getattr(calibration, n)[:, twins] for n in ("chosen", "order", "place", "tail")}
    )
    first = {index: names[at] for at, index in reversed(list(enumerate(flat_indices(names))))}
    pattern = Calibrated(calibration)
    drive = getattr(model, form, lambda pipe: model.run_grid(pipe, grid=model.sizes[0], text_len=7, steps=4))
    calls = recorded(model.pipe, Recipe(pattern, block_size=(16, 16)), drive)
    assert [call.step for call in calls] == ([0, 1, 2, 3] if form == "steps" else [0] * len(calls))
    for call in calls:
        model.oracle.check(call, model.sizes[0], lambda layer, head: pattern.for_head(first[layer], head))


@pytest.mark.parametrize("name", MODELS)
def test_windows_that_move_from_step_to_step(models, name):
    """Those of head 1 by draws of their own."""
    model, windows = models(name), {1: ShiftedWindow(seed=1)}
    assert len({ShiftedWindow().at_step(step) for step in range(4)}) > 1
    grid = (2, 9, 16)[-len(model.sizes[0]) :]  # quarters of windows are 1 and 2 tokens
    recipe = Recipe({"all": ShiftedWindow(), "heads.1": windows[1]}, block_size=(16, 16))
    calls = recorded(model.pipe, recipe, lambda pipe: model.run_grid(pipe, grid=grid, text_len=7, steps=4))
    assert [call.step for call in calls] == [0, 1, 2, 3]
    for call in calls:
        model.oracle.check(call, grid, lambda layer, head: windows.get(head, ShiftedWindow()))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "cogvideox"])
def test_patterns_that_change_with_the_noise(models, name):
    """Dense, then a wide window, then a narrow one, in both branches of guidance; head 1 at other levels."""
    model, grid = models(name), models(name).sizes[0]
    wide, narrow = Neighborhood((4, 5)), Neighborhood(3)
    default, other = (
        ByNoise({0.9: Dense(), 0.6: wide, 0: narrow}),
        ByNoise({0.9: Dense(), 0.4: Clear(3), 0: wide}),
    )
    recipe = Recipe({"all": default, "heads.1": other}, order="tile", block_size=(16, 16))
    drive = lambda pipe: model.run_grid(pipe, grid=grid, text_len=7, steps=4, cfg=3.0)  # noqa: E731
    calls = recorded(model.pipe, recipe, drive)
    first = {call.sigma for call in calls if call.step == 0}
    assert list(first) == [pytest.approx(1, abs=1e-5)]  # 0.999999 by UniPC
    strong = name == "skyreels"  # its shift of noise leaves none of four steps below 0.4
    assert len({other.at_step(0, call.sigma) for call in calls}) == (2 if strong else 3)
    for call in calls:
        if call.sigma < 0.9:  # else both are dense
            model.oracle.check(call, grid, lambda layer, head: (default, other)[head])


@pytest.mark.parametrize("reference", [(3, 5)], ids=str)
def test_local_windows_beside_an_anchor(models, reference):
    """Kontext's reference image is the anchor, which attends to itself and to text alone."""
    model = models("flux")
    inputs = dict(model.branches[0])
    ids = torch.cartesian_prod(torch.tensor([1]), *(torch.arange(n) for n in reference))
    tokens = torch.randn(1, len(ids), 16, generator=torch.Generator().manual_seed(0))
    inputs["img_ids"] = torch.cat([inputs["img_ids"], ids])
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], tokens], dim=1)
    pattern = LocalGlobal((3, 4))
    recipe = Recipe(pattern, order="hilbert", block_size=(16, 16))
    (call,) = recorded(model.pipe, recipe, lambda pipe: pipe.transformer(**inputs))
    model.oracle.check(call, model.sizes[0], lambda layer, head: pattern, anchor=(1, *reference))


def small_grid(pattern: Pattern, video: bool) -> tuple[int, ...]:
    """In tokens: hardly more than its windows for a pattern that insists on them, sides even as Wan's are."""
    if isinstance(pattern, Neighborhood):
        return (pattern.window[0] + 1, *(side + side % 2 for side in pattern.window[1:]))
    if isinstance(pattern, Clustered):  # of which a block of queries meets few only among many
        return (8, 12, 10)
    return (4, 8, 8) if video else (20, 24)


def preset_cases() -> list:
    """Each bundled model, each of its presets that is a mask in one step, and the grid.

    In thousands of tokens it is slow.
    """
    cases = []
    for name, info in tiny.INFO.items():
        for preset, recipe in presets(info.family).items():
            if preset.startswith(f"{name}-") and not isinstance(
                recipe.attention, (Agent, InLine, Rectified, Skipping)
            ):
                grid = small_grid(recipe.attention, info.video)
                marks = [pytest.mark.slow] if math.prod(grid) > 1000 else []
                cases.append(pytest.param(name, preset, grid, id=preset, marks=marks))
    return cases


@pytest.mark.parametrize(("name", "preset", "grid"), preset_cases())
def test_bundled_models_with_their_presets(masked, name, preset, grid):
    """The pipeline up to its first sparse step, whose call is compared: the pattern alone, in all layers."""
    pipe, info = load(name), tiny.INFO[name]
    recipe = dataclasses.replace(presets()[preset], dense_layers=0, tail=None)
    pipe.set_progress_bar_config(disable=True)
    steps = recipe.dense_steps + 1
    options = {
        "height": 8 * grid[-2], "width": 8 * grid[-1], "num_inference_steps": steps, "guidance_scale": 1.0,
        "max_sequence_length": info.max_sequence_length, "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }  # fmt: skip
    if info.video:
        options["num_frames"] = 4 * grid[0] - 3
    calls = recorded(pipe, recipe, lambda pipe: pipe("a red circle", **options))
    assert [call.step for call in calls] == list(range(steps))
    Oracle(pipe.transformer, masked).check(calls[-1], grid, lambda layer, head: recipe.attention)


def test_every_pattern_and_family_is_in_the_tables(models):
    public = {getattr(patterns, name) for name in patterns.__all__}
    public = {pattern for pattern in public if dataclasses.is_dataclass(pattern)}  # and no base
    for kind, cases in CASES.items():
        some = [case.attention.values() if isinstance(case, Mixture) else [case] for case in cases.values()]
        used = {type(pattern) for chosen in some for pattern in chosen}
        excluded = {pattern for of, pattern in EXCLUDED if of == kind}
        assert used | excluded == public
        assert not used & excluded
    tried = {models(name).oracle.family for name in MODELS}
    assert tried | set(map(pipelines.family_named, ELSEWHERE)) == set(pipelines.families())


def test_excluded_patterns_are_what_is_said_of_them():
    layout = TokenLayout((1, 8, 12), 7)
    assert Radial(0.2, block_size=16).token_mask(layout).all()
    spatial, temporal = SpatialHead(0.5, block_size=8), TemporalHead(0.5, block_size=8)
    assert torch.equal(temporal.token_mask(layout), spatial.token_mask(layout))
    with pytest.raises(ValueError, match="has one frame; use another pattern"):
        ADAPTIVE.density(layout)
