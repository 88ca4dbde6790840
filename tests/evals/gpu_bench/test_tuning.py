"""The fastest launch: by the geometric mean over all cases, never by what was measured on some."""

import pytest

from dit_accel.evals.gpu_bench import cases, tuning
from dit_accel.kernels.block_sparse.tuned import Launch

DEFAULT, SMALL, LARGE = Launch(128, 64, 8, 5), Launch(64, 32, 4, 2), Launch(128, 32, 8, 3)
TMA, WIDE = Launch(128, 64, 8, 2, "tma"), Launch(128, 128, 8, 2, "tma", 128)
HERE = {
    "kind": "machine",
    "capability": [9, 0],
    "environment": {
        "gpus": [{"name": "a GPU"}], "cpu": {"name": "a processor"}, "cuda": "12.8", "commit": "abc",
        "packages": {"torch": "2.11.0", "triton": "3.6.0"},
    },
}  # fmt: skip


def row(launch, case, ms, head_dim=128):
    return {
        "launch": list(launch),
        "case": [case, ""],
        "tflops": 9 / ms,
        "head_dim": head_dim,
        "element_bytes": 2,
    }


def test_by_the_geometric_mean():
    rows = [row(DEFAULT, "a", 2.0), row(DEFAULT, "b", 10.0), row(SMALL, "a", 1.0), row(SMALL, "b", 16.0)]
    assert tuning.choose(rows, DEFAULT) == (SMALL, pytest.approx((2 * 10 / 16) ** 0.5))


def test_not_by_what_was_measured_on_some_cases():
    rows = [row(DEFAULT, "a", 2.0), row(DEFAULT, "b", 10.0), row(SMALL, "a", 0.1)]
    assert tuning.choose(rows, DEFAULT) == (DEFAULT, 1.0)


def test_the_default_where_nothing_is_faster():
    rows = [row(DEFAULT, "a", 2.0), row(SMALL, "a", 2.0), row(LARGE, "a", 3.0)]
    assert tuning.choose(rows, DEFAULT) == (DEFAULT, 1.0)


def test_nothing_without_the_default():
    assert tuning.choose([row(SMALL, "a", 1.0)], DEFAULT) is None
    assert tuning.choose([], DEFAULT) is None


def test_entries_say_what_they_were_measured_on():
    rows = [row(DEFAULT, "a", 2.0), row(SMALL, "a", 1.0), row(LARGE, "c", 1.0, head_dim=64)]
    (entry,) = tuning.entries(rows, {128: (DEFAULT,), 64: (DEFAULT,)}, HERE)
    key = (9, 0), 2, 128, "pointer", 64, "none", "forward"
    assert (entry.key, entry.launch, entry.gain) == (key, SMALL, 2.0)
    assert (entry.gpu, entry.torch, entry.triton) == ("a GPU", "2.11.0", "3.6.0")
    assert (entry.cuda, entry.commit) == ("12.8", "abc")


def test_each_kernel_and_size_of_blocks_has_an_entry_of_its_own():
    rows = [row(DEFAULT, "a", 2.0), row(SMALL, "a", 3.0), row(TMA, "a", 1.6), row(WIDE, "a", 1.0)]
    first, second, third = tuning.entries(rows, {128: (DEFAULT,)}, HERE)
    assert [entry.launch for entry in (first, second, third)] == [DEFAULT, TMA, WIDE]
    assert [entry.gain for entry in (first, second, third)] == [1.0, 1.25, 2.0]


def test_numeric_formats_have_entries_of_their_own():
    """Against the default in 16 bits; ways of the kernel in Gluon compete."""
    plain = Launch(128, 64, 8, 3, "gluon", 64, "int8")
    both = plain._replace(ping_pong=True, persistent=True)
    rows = [row(DEFAULT, "a", 2.0), row(plain, "a", 1.6), row(both, "a", 1.0)]
    first, second = tuning.entries(rows, {128: (DEFAULT,)}, HERE)
    assert (first.launch, first.gain) == (DEFAULT, 1.0)
    assert (second.launch, second.gain, second.format, second.ping_pong) == (both, 2.0, "int8", True)
    assert second.key == ((9, 0), 2, 128, "gluon", 64, "int8", "forward")


def test_parts_of_the_backward_pass_have_entries_of_their_own():
    """Each against the kernel with pointers for the same part, whatever others take."""
    dq, dkv = (DEFAULT._replace(part=part) for part in ("dq", "dkv"))
    by_tma = TMA._replace(part="dkv")
    times = (
        (DEFAULT, 2.0),
        (TMA, 1.0),
        (dq, 8.0),
        (SMALL._replace(part="dq"), 4.0),
        (dkv, 9.0),
        (by_tma, 3.0),
    )
    found = tuning.entries([row(launch, "a", ms) for launch, ms in times], {128: (DEFAULT, dq, dkv)}, HERE)
    assert [(entry.part, entry.kernel, entry.gain) for entry in found] == [
        ("forward", "pointer", 1.0), ("forward", "tma", 2.0),
        ("dq", "pointer", 2.0), ("dkv", "pointer", 1.0), ("dkv", "tma", 3.0),
    ]  # fmt: skip
    assert found[2].launch == SMALL._replace(part="dq")
    assert len({entry.key for entry in found}) == len(found)
    assert tuning.entries([row(by_tma, "a", 1.0)], {128: (DEFAULT, dq, dkv)}, HERE) == [], "against nothing"


def test_hopeless_launches_are_not_tried_again():
    case = cases.SHAPES[0]
    rows = [
        {"launch": list(launch), "case": [case.name, case.preset], "tflops": 9 / ms}
        for launch, ms in (
            (SMALL, 1.0), (DEFAULT, 9.0), (LARGE, 1.2), (Launch(64, 64, 8, 2), 1.31), (TMA, 4.0), (WIDE, 0.5),
        )
    ]  # fmt: skip
    assert tuning.promising(rows, case, DEFAULT) == [DEFAULT, WIDE, SMALL, LARGE, TMA]
    assert tuning.promising([], case, DEFAULT) == [DEFAULT]
    dq = DEFAULT._replace(part="dq")
    rows += [row(dq, case.name, 90.0) | {"case": [case.name, case.preset]}]
    assert tuning.promising(rows, case, DEFAULT) == [DEFAULT, WIDE, SMALL, LARGE, TMA], "of the same part"
    assert tuning.promising(rows, case, dq) == [dq]
