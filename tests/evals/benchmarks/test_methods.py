"""Methods at wanted densities."""

import pytest

from dit_accel.evals.benchmarks.methods import METHODS, Method, fitted, of_kind
from dit_accel.masks.layout import TokenLayout
from dit_accel.patterns import Neighborhood, Rectified, Routed

VIDEO, IMAGE = TokenLayout((9, 16, 16)), TokenLayout((1, 48, 48), 24)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_is_aimed_at_is_near_what_is_wanted(method):
    layout = VIDEO if method.video else IMAGE
    pattern = fitted(method, 0.5, layout, lambda pattern: pattern.density(layout), tries=12)
    assert pattern is not None
    assert pattern.density(layout) == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("video", [True, False])
def test_kinds(video):
    names = {method.name for method in of_kind(video)}
    assert {"Neighborhood", "Routed, top k", "Clustered", "Rectified", "XAttention"} <= names
    assert ("Radial" in names) == video
    assert ("CLEAR" in names) == (not video)


def test_the_knob_follows_what_is_measured():
    """Where text takes a share for itself, less is left for what is chosen."""
    top = Method("top", lambda share, _: Routed(top_k=share))
    found = fitted(top, 0.5, IMAGE, lambda pattern: 0.2 + 0.8 * pattern.top_k)
    assert 0.2 + 0.8 * found.top_k == pytest.approx(0.5, rel=0.1)


def test_none_where_nothing_is_near():
    text = Method("text", lambda share, _: Routed(top_k=share))
    assert fitted(text, 0.1, IMAGE, lambda pattern: 0.4 + pattern.top_k) is None


def test_knobs_that_a_layout_refuses_are_raised():
    def at(share: float, layout: TokenLayout) -> Neighborhood:
        if share < 0.2:
            raise ValueError("too narrow")
        return Neighborhood(3)

    assert fitted(Method("narrow", at), 0.1, IMAGE, lambda _: 0.1) == Neighborhood(3)


def test_rectified_at_one_block_keeps_one():
    (method,) = (one for one in METHODS if one.name == "Rectified")
    assert method.at(0.001, VIDEO) == Rectified(mass=1e-6, least=1, neighbours=False, block_size=64)
