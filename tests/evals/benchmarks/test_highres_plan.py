"""Plans of high-resolution runs against runs: what is compared with what."""

import pytest

from dit_accel.evals.benchmarks import memory
from dit_accel.evals.benchmarks.highres_plan import CPU, Row, compared


def test_stages_are_compared():
    if memory.reset(CPU):
        pytest.skip("peaks of a CPU are read from Linux with glibc")
    rows = compared("tiny-flux", "upscaled", (96, 96), 2, 0.5)
    assert [row.stage for row in rows] == ["native pass", "enlarging, pass above native size", "decode"]
    assert all(row.planned > 11e6 and row.measured > 11e6 for row in rows)  # the weights alone
    with pytest.raises(ValueError, match="only two passes are compared"):
        compared("tiny-flux", "direct", (96, 96), 2, 0.5)


def test_cells():
    assert Row("swim", "decode", 90_000_000, 100_000_000).cells() == (
        "swim",
        "decode",
        "90.0 MB",
        "100.0 MB",
        "-10.0%",
    )
