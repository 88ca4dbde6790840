"""What the soak of the demo calls a fault."""

import pytest

from dit_accel.evals.demo_soak import WARM_UP, faults, growth

FINE = {
    "answered": {"mask": 3},
    "wrong": [],
    "hung": 0,
    "server_tracebacks": 0,
    "folders_left": [],
    "growth": 1.0,
}


def memory(seconds, size):
    """Samples of a run, its bytes by the second."""
    return [(t, size(t)) for t in range(0, seconds, 5)]


def test_growth_is_after_the_models_are_loaded():
    assert growth(memory(1200, lambda t: 100 + min(t, WARM_UP))) == 1


def test_a_steady_leak_is_growth_by_what_it_adds():
    assert growth(memory(1205, lambda t: 10_000 + t)) == pytest.approx(11_200 / 10_300)


def test_what_is_under_way_at_the_end_is_no_growth():
    assert growth(memory(1200, lambda t: 1500 if t > 1000 else 1000)) == 1


def test_a_long_run_is_fitted_too():
    assert growth(memory(4 * 3600, lambda t: 10_000 + t)) == pytest.approx(24_400 / 10_300, rel=0.01)


def test_a_short_run_says_nothing_of_growth():
    assert growth(memory(2 * WARM_UP, lambda t: t)) is None
    assert growth([]) is None
    assert faults({**FINE, "growth": None}) == []


def test_nothing_is_wrong_where_nothing_is():
    assert faults(FINE) == []


@pytest.mark.parametrize(
    "change",
    [
        {"answered": {}},
        {"wrong": ["mask: lost"]},
        {"hung": 1},
        {"server_tracebacks": 2},
        {"folders_left": ["dit-accel-demo-x"]},
        {"growth": 1.2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_fault_is_told(change):
    assert len(faults({**FINE, **change})) == 1
