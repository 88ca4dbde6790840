"""Which layers' attention outputs are compared."""

from types import SimpleNamespace

import pytest

from dit_accel.distillation.taps import default_taps

DOUBLE = {f"double.{i}": SimpleNamespace(to_out=[None]) for i in range(19)}
SINGLE = {f"single.{i}": SimpleNamespace() for i in range(38)}


def test_of_flux_those_of_the_paper():
    layers = {**DOUBLE, **SINGLE}
    flat = list(layers)
    assert [flat.index(name) for name in default_taps(layers, flat)] == list(range(20, 57, 4))


@pytest.mark.parametrize(
    ("changed", "taps"),
    [
        (["double.3", "double.8", "double.9"], ["double.8"]),  # no single-stream one is changed
        (["double.8", "single.2", "single.3"], ["single.3"]),  # its flat index is 22, none is a multiple of 4
        (["double.5"], ["double.5"]),
    ],
)
def test_of_what_is_changed(changed, taps):
    assert default_taps({**DOUBLE, **SINGLE}, changed) == taps
