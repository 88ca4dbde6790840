"""Break-even lengths: read from measured results, shown by `summary` and `plan`, kept to by `min_tokens`."""

import math

import pytest
import torch

import dit_accel
from dit_accel import Recipe, UnavailableError
from dit_accel.kernels.block_sparse import native
from dit_accel.patterns import Clear
from dit_accel.planning.plan import plan
from dit_accel.runtime.measured_speed import MeasuredSpeed, measured_speed
from dit_accel.runtime.speed_table import BreakEven, SpeedTable, this_machine

LENGTHS = ((0.1, 500.0), (0.25, 1000.0), (0.5, 3000.0))


def test_lengths_of_the_nearest_head_dim_and_the_dtype_are_read():
    rows = [BreakEven("float32", 64, *pair) for pair in reversed(LENGTHS)]
    rows += [BreakEven("float32", 256, 0.5, 7.0), BreakEven("bfloat16", 64, 0.5, 8.0)]
    tables = [SpeedTable(this_machine("cpu"), break_even=tuple(rows))]
    assert measured_speed("cpu", "float32", 32, tables=tables).break_even == LENGTHS
    assert measured_speed("cpu", "float32", 192, tables=tables).break_even == ((0.5, 7.0),)
    assert measured_speed("cpu", "bfloat16", 64, tables=tables).break_even == ((0.5, 8.0),)
    assert measured_speed("cuda", "float32", 64).break_even == ()
    assert measured_speed("cpu", "float32", 64, tables=tables).of_backend("flex", "cpu").break_even == ()


@pytest.mark.parametrize(
    ("density", "tokens"), [(0.05, 500), (0.1, 500), (0.2, 1000), (0.5, 3000), (0.6, math.inf)]
)
def test_a_density_takes_the_length_of_the_next_measured_one(density, tokens):
    assert MeasuredSpeed(break_even=LENGTHS).least_tokens(density) == tokens


def test_what_was_measured_is_said():
    assert (
        "500 at density 0.1, 1000 at density 0.25" in MeasuredSpeed(break_even=LENGTHS).describe_break_even()
    )
    assert MeasuredSpeed().describe_break_even() == "break-even length: not measured"


@pytest.mark.parametrize("value", [-1, 2.5, True, "short"])
def test_bad_lengths_are_refused(value):
    with pytest.raises(ValueError, match="`min_tokens` must be a whole number"):
        Recipe(Clear(2), min_tokens=value)


def test_short_layers_keep_the_models_own_attention(flux):
    untouched = flux.run(flux.pipe)
    with dit_accel.accelerated(flux.pipe, Recipe(Clear(1), min_tokens=10_000)) as handle:
        assert torch.equal(flux.run(flux.pipe), untouched)
        assert handle.run_density == 1.0
        rows = dit_accel.summary(flux.pipe).rows
        assert all("fewer than min_tokens (10000)" in row["note"] for row in rows)
        assert all(row["density"] == 1.0 and row["pattern"] is None for row in rows)
    with dit_accel.accelerated(flux.pipe, Recipe(Clear(1), min_tokens=1)):
        assert not torch.equal(flux.run(flux.pipe), untouched)
        assert not any("min_tokens" in row["note"] for row in dit_accel.summary(flux.pipe).rows)


def test_auto_needs_a_measurement(flux):
    with pytest.raises(UnavailableError, match="break-even length, and that of backend 'reference'"):
        dit_accel.enable(flux.pipe, Recipe(Clear(1), min_tokens="auto", backend="reference"))


def test_a_density_beyond_the_measured_ones_stays_dense(flux):
    with dit_accel.accelerated(flux.pipe, Recipe(Clear(1000), min_tokens="auto")) as handle:
        flux.run(flux.pipe)
        assert handle.run_density == 1.0
        notes = [row["note"] for row in dit_accel.summary(flux.pipe).rows]
    assert all("at density 1.00 sparse attention was not measured to be faster" in note for note in notes)


def test_a_dtype_without_a_measurement_is_refused_at_its_first_call(flux):
    dit_accel.enable(flux.pipe, Recipe(Clear(1), min_tokens="auto"))
    flux.run(flux.pipe)
    flux.pipe.to(torch.float16)
    with pytest.raises(UnavailableError, match=r"was not measured on cpu in torch\.float16"):
        flux.run(flux.pipe)


def test_the_plan_says_where_it_extrapolates():
    said = [
        any("fewer than were measured" in note for note in plan(Clear(4), model="tiny-flux", size=size).notes)
        for size in ((128, 128), (512, 512))
    ]
    assert said == [True, False]


def test_what_was_measured_is_not_claimed_for_a_slower_backend(flux, monkeypatch):
    assert plan(Clear(4), model="tiny-flux", size=(256, 256)).attention.predicted is not None
    monkeypatch.setattr(native, "_reason", lambda: "there is no compiler")
    assert plan(Clear(4), model="tiny-flux", size=(256, 256)).attention.predicted is None
    with pytest.raises(UnavailableError, match="that of backend 'gather' was not measured"):
        dit_accel.enable(flux.pipe, Recipe(Clear(1), min_tokens="auto"))
    dit_accel.enable(flux.pipe, Clear(1))
    assert "break-even length: not measured" in str(dit_accel.summary(flux.pipe))


@pytest.mark.parametrize(("lengths", "sparse"), [(((1.0, 10.0),), True), (((1.0, 10_000.0),), False)])
def test_the_plan_keeps_short_layers_dense(lengths, sparse):
    rates = MeasuredSpeed((0.8, 0.8, 0.8), 1.0, break_even=lengths)
    answer = plan(Recipe(Clear(4), min_tokens="auto"), model="tiny-flux", size=(256, 256), rates=rates)
    assert (answer.mask is not None) == sparse
    assert (answer.attention.predicted != 1.0) == sparse
    assert all((layer.pattern is not None) == sparse for layer in answer.layers)
    assert sparse or all("fewer than min_tokens (10000)" in layer.reason for layer in answer.layers)
    assert any("faster from these numbers of tokens" in note for note in answer.notes)
