"""Whatever number a pattern is given: it is exact on any layout, or refused with the argument's name."""

import math
from dataclasses import MISSING, fields, is_dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel import TokenLayout, patterns
from dit_accel.arguments import integer, shown
from dit_accel.errors import UnavailableError
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
    OnlinePattern,
    Radial,
    Rectified,
    Routed,
    ShiftedWindow,
    Skipping,
    SlidingTile,
    SparseLinear,
    SparseVideoGen,
    SpatialHead,
    StaticPattern,
    TemporalHead,
    VideoSparse,
)

EDGES = [46_340, 46_341, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 2**70]
huge = st.sampled_from(EDGES) | st.integers(10_000, 2**70)
small = st.integers(1, 4)
integers = small | small | huge
numbers = small | st.floats(0.25, 1) | st.floats(0.5, 8) | huge
bad = st.sampled_from(
    [0, -1, -(2**70), True, None, "8", math.nan, -math.inf, math.inf, 1e-320, np.float32("nan")]
)


shares = st.floats(0.05, 1)


def tuples(count: int) -> st.SearchStrategy:
    return st.tuples(*[integers] * count)


def per_axis(entries: st.SearchStrategy) -> st.SearchStrategy:
    return entries | st.tuples(entries, entries) | st.tuples(entries, entries, entries)


BAND = {
    "keep": st.floats(0.25, 1),
    "first_frame_sink": st.booleans(),
    "inclusive": st.booleans(),
    "block_size": integers,
}
static = st.sampled_from([Clear(1), InwardWindow((1, 1)), Dense()])
ARGUMENTS = {  # of every pattern, good ones
    Dense: {},
    Clear: {"radius": numbers, "downsample": st.none()},
    ByNoise: {"levels": st.tuples(st.tuples(shares, st.just(Dense())), st.tuples(st.just(0), static))},
    ChunkCausal: {"frames": integers, "base": st.none() | static, "window": st.none() | integers},
    ChunkGrowth: {
        "frames_per_chunk": small,
        "density": shares,
        "base": st.just(0) | st.just(0.05),
        "window": st.none() | integers,
        "top_frames": integers,
        "block_size": st.tuples(st.sampled_from([16, 48, 64]), st.sampled_from([8, 48, 64])),
    },
    Radial: {
        "decay_factor": numbers,
        "block_size": integers,
        "first_frame_sink": st.booleans(),
        "exact": st.booleans(),
    },
    InwardWindow: {"half_window": tuples(2)},
    SlidingTile: {"window": tuples(3), "tile": tuples(3)},
    LocalGlobal: {"window": integers | tuples(2), "offset": integers | tuples(2), "sliding": st.booleans()},
    ShiftedWindow: {
        "windows": tuples(2),
        "shift": st.just("step") | integers | tuples(2),
        "seed": integers,
    },
    Neighborhood: {
        "window": per_axis(small),
        "stride": per_axis(integers) | st.just(1),
        "dilation": per_axis(integers) | st.just(1),
        "is_causal": per_axis(st.booleans()),
    },
    SpatialHead: BAND,
    TemporalHead: BAND,
    Clustered: {
        "query_clusters": integers,
        "key_clusters": integers,
        "top_p": shares,
        "least": shares,
        "iterations": st.tuples(small, small),
    },
    Rectified: {
        "base": st.sampled_from([None, Clear(1), InwardWindow((1, 1))]),
        "mass": shares,
        "least": integers,
        "neighbours": st.booleans(),
        "order": st.sampled_from(["gilbert", "raster", "tile"]),
        "block_size": st.sampled_from([16, 48, 64]),
        "gain_aware": st.booleans(),
    },
    Routed: {
        "top_k": shares,
        "top_p": shares,
        "crossing": st.booleans(),
        "similarity": st.none() | st.floats(-1, 1),
        "smooth_keys": st.booleans(),
        "sink": st.booleans(),
        "score": st.sampled_from(["mean", "antidiagonal"]),
        "stride": integers,
        "union": st.sampled_from([None, Clear(1), InwardWindow((1, 1))]),
        "block_size": st.tuples(st.sampled_from([16, 48, 64]), st.sampled_from([8, 48, 64])),
        "pv_threshold": st.none() | numbers,
        "refresh": integers,
    },
    Skipping: {
        "threshold": st.floats(-20, -0.1) | small.map(lambda n: -n) | huge.map(lambda n: -n),
        "every": integers,
        "reset": st.none() | integers,
        "block_size": st.tuples(st.sampled_from([16, 48, 64]), st.sampled_from([8, 48, 64])),
    },
    SparseLinear: {
        "top_k": shares,
        "form": st.sampled_from(["complement", "all"]),
        "block_size": st.tuples(st.sampled_from([16, 48, 64]), st.sampled_from([8, 48, 64])),
        "feature_map": st.sampled_from(["softmax", "elu", "relu"]),
        "negligible": st.floats(0, 0.99),
    },
    Agent: {
        "patch": st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
        "exponent": st.floats(0, 1),
        "shortcut": st.floats(0, 1),
    },
    InLine: {},
    VideoSparse: {
        "top_k": shares,
        "cube": st.sampled_from([(4, 4, 4), (1, 8, 8), (2, 4, 2)]),
    },
    SparseVideoGen: {**BAND, "profile_frames": numbers, "rows": integers, "seed": integers},
}


@st.composite
def cases(draw):
    """A pattern, its arguments, one of them perhaps a bad one, others left at their defaults."""
    cls = draw(st.sampled_from(list(ARGUMENTS)))
    needed = [f.name for f in fields(cls) if f.default is MISSING]
    names = draw(st.sets(st.sampled_from(list(ARGUMENTS[cls])))) if ARGUMENTS[cls] else set()
    arguments = {name: draw(ARGUMENTS[cls][name]) for name in sorted({*names, *needed})}
    if arguments and draw(st.sampled_from([False, False, False, True])):
        arguments[draw(st.sampled_from(list(arguments)))] = draw(bad)
    return cls, arguments


layouts = st.builds(
    TokenLayout,
    st.tuples(st.sampled_from([1, 2, 5]), st.integers(1, 7), st.integers(1, 9)),
    st.sampled_from([0, 5]),
    st.booleans(),
    st.sampled_from([None, (1, 2, 2)]),
)


def message_of(refusing) -> str:
    """Of the documented error that it raises, if it does."""
    try:
        refusing()
    except (ValueError, TypeError, UnavailableError) as error:
        return str(error)
    return ""


@given(cases(), layouts)
@settings(max_examples=500, deadline=None)
def test_exact_or_refused(case, layout):
    cls, arguments = case
    refused = message_of(lambda: cls(**arguments))
    pattern = None if refused else cls(**arguments)
    refused = refused or message_of(lambda: pattern.density(layout))
    if refused:
        assert "has one frame" in refused or any(f"`{f.name}`" in refused for f in fields(cls))
        return
    assert pattern == eval(repr(pattern), vars(patterns))  # all its numbers are plain
    density = pattern.density(layout)
    if isinstance(pattern, StaticPattern):
        exact = pattern.token_mask(layout)
        assert exact.diagonal().all(), "a token that does not attend to itself"
        assert density == pytest.approx(exact.double().mean().item(), abs=1e-12)
        assert torch.equal(pattern.block_mask(layout, (16, 8)).to_token_mask(), exact)
    elif not pattern.blocks:
        assert 0 <= density <= 1
    elif isinstance(pattern, OnlinePattern):
        q, k = torch.randn(2, 1, 2, layout.seq_len, 8, generator=torch.Generator().manual_seed(0))
        assert 0 < density <= 1 + 1e-12
        assert pattern.select(q, k, layout).to_token_mask().any(-1).all()
    else:
        assert density == pytest.approx(pattern.head_mask(layout, (16, 8)).density, abs=1e-12)


def test_every_argument_of_every_pattern_is_drawn():
    shipped = {getattr(patterns, name) for name in patterns.__all__}
    of_files = {Calibrated}  # whose arguments are a file: patterns/test_calibration.py
    assert {*ARGUMENTS, *of_files} == {pattern for pattern in shipped if is_dataclass(pattern)}
    assert all(set(arguments) == {f.name for f in fields(cls)} for cls, arguments in ARGUMENTS.items())


BIG = 10_000  # more than any length or number of tokens below
SATURATING = {
    "Clear.radius": Clear,
    "InwardWindow.half_window": lambda n: InwardWindow((n, 1)),
    "SlidingTile.window": lambda n: SlidingTile((1, n, 3), (1, 2, 2)),
    "SlidingTile.tile": lambda n: SlidingTile((1, 1, 1), (2, 2, n)),
    "LocalGlobal.window": lambda n: LocalGlobal((3, n)),
    "LocalGlobal.window, sliding": lambda n: LocalGlobal((n, 3), sliding=True),
    "ShiftedWindow.windows": lambda n: ShiftedWindow((n, 2), shift=1),
    "Radial.decay_factor": lambda n: Radial(n, 4),
    "Radial.decay_factor, exact": lambda n: Radial(n, 4, exact=True),
    "ChunkCausal.frames": ChunkCausal,
    "ChunkCausal.frames, base": lambda n: ChunkCausal(n, Clear(3)),
    "ChunkCausal.window": lambda n: ChunkCausal(2, window=n),
    "Radial.block_size": lambda n: Radial(0.2, n),
    "Radial.block_size, exact": lambda n: Radial(0.2, n, exact=True),
    "SpatialHead.block_size": lambda n: SpatialHead(0.5, inclusive=True, block_size=n),
    "TemporalHead.block_size": lambda n: TemporalHead(0.5, inclusive=True, block_size=n),
}


@given(n=huge, grid=st.sampled_from([(5, 6, 7), (1, 9, 12), (9, 2, 3)]))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("make", SATURATING.values(), ids=SATURATING)
def test_more_than_the_grid_is_the_same_as_much_more(make, n, grid):
    layout = TokenLayout(grid)
    assert torch.equal(make(n).token_mask(layout), make(BIG).token_mask(layout))
    assert make(n).density(layout) == make(BIG).density(layout)
    mask = make(n).block_mask(layout, (16, 8)).to_token_mask()
    assert torch.equal(mask, make(BIG).token_mask(layout))


@given(n=huge, sign=st.sampled_from([-1, 1]))
@settings(max_examples=40, deadline=None)
def test_shifts_go_round(n, sign):
    """Windows that are moved by the length of an axis, however often, are where they were."""
    layout, n = TokenLayout((2, 7, 10)), sign * n
    for moved, same in (
        (LocalGlobal((3, 4), offset=n), LocalGlobal((3, 4), offset=(n % 7, n % 10))),
        (ShiftedWindow((2, 3), shift=(n, n)), ShiftedWindow((2, 3), shift=(n % 7, n % 10))),
        (ShiftedWindow((1, 1), shift=n), ShiftedWindow((1, 1), shift=(n % 7, n * 2 % 10))),
    ):
        assert torch.equal(moved.token_mask(layout), same.token_mask(layout))


@given(st.fractions(0, 9), st.floats(1e-320, 9, allow_subnormal=True))
def test_the_edge_of_a_disc_is_exact(square, radius):
    """dy^2 + dx^2 < radius^2 in exact arithmetic, where floats round."""
    layout = TokenLayout((1, 1, 12))
    for r in (radius, math.sqrt(square)):
        if r > 0:
            inside = Clear(r).token_mask(layout)[0]
            assert inside.tolist() == [dx < r for dx in range(12)]


@pytest.mark.parametrize("radius", [40_000, 46_341, 49_999.5, 2**70])
def test_discs_on_an_axis_whose_squares_pass_32_bits(radius):
    layout = TokenLayout((1, 1, 50_000))
    mask = Clear(radius).block_mask(layout, (512, 512), "raster")
    reach = min(math.ceil(radius) - 1, 49_999)
    pairs = 50_000 + 2 * sum(50_000 - d for d in range(1, reach + 1))
    assert mask.density == Clear(radius).density(layout) == pairs / 50_000**2


@pytest.mark.parametrize(
    ("pattern", "plain"),
    [
        (Clear(np.int64(8)), Clear(8)),
        (Radial(np.float64(0.2), np.int32(16)), Radial(0.2, 16)),
        (Neighborhood((np.int64(3), 5), stride=np.int8(2)), Neighborhood((3, 5), stride=2)),
        (InwardWindow((np.int64(3), 5)), InwardWindow((3, 5))),
        (LocalGlobal(np.uint8(4)), LocalGlobal(4)),
        (SparseVideoGen(np.float32(0.5), rows=np.int64(9)), SparseVideoGen(0.5, rows=9)),
    ],
    ids=lambda pattern: type(pattern).__name__,
)
def test_numbers_of_numpy_are_made_plain(pattern, plain):
    assert pattern == plain
    assert repr(pattern) == repr(plain)


@pytest.mark.parametrize("value", [True, math.nan, math.inf, "8", None, [], {}, 1j, ...], ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: Clear(value), "radius"),
        (lambda value: Radial(value), "decay_factor"),
        (lambda value: Radial(block_size=value), "block_size"),
        (lambda value: InwardWindow((value, 2)), "half_window"),
        (lambda value: SlidingTile((1, 1, 1), (2, value, 2)), "tile"),
        (lambda value: LocalGlobal(window=value), "window"),
        (lambda value: LocalGlobal(offset=(value, 1)), "offset"),
        (lambda value: ShiftedWindow(windows=(2, value)), "windows"),
        (lambda value: ShiftedWindow(shift=value), "shift"),
        (lambda value: ShiftedWindow(seed=value), "seed"),
        (lambda value: Neighborhood((3, value)), "window"),
        (lambda value: Neighborhood(3, dilation=(value, 1)), "dilation"),
        (lambda value: SpatialHead(value), "keep"),
        (lambda value: SparseVideoGen(profile_frames=value), "profile_frames"),
        (lambda value: SparseVideoGen(rows=value), "rows"),
    ],
)
def test_what_is_no_number_is_refused(make, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        make(value)


@pytest.mark.parametrize("value", [1, 0, None, "yes"], ids=repr)
@pytest.mark.parametrize("name", ["first_frame_sink", "exact"])
def test_switches_are_true_or_false(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be True or False"):
        Radial(**{name: value})


def test_values_are_shown_shortened_and_at_once():
    doubling, knot = [1], []
    knot.append(knot)
    for _ in range(200):
        doubling = [doubling, doubling]
    for value in (
        doubling,
        knot,
        "a" * 10**6,
        10**100_000,
        -(10**100_000),
        {n: n for n in range(10**5)},
        b"a" * 999,
    ):
        assert len(shown(value)) < 400
    assert shown(10**9) == "1000000000"
    assert shown((1, 2.5, "three", None)) == "(1, 2.5, 'three', None)"
    assert shown(10**5000) == "an integer of 16610 bits"
    with pytest.raises(ValueError, match="`n` must be a positive integer, got an integer of 16610 bits"):
        integer("n", -(10**5000), 1)
