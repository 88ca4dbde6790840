"""Integers on Blackwell: which Triton leaves them to older instructions, and that it is said once."""

import pytest

from dit_accel.kernels.block_sparse.integer_products import older_instructions, warn_of_older_instructions


@pytest.mark.parametrize(
    ("gpu", "version", "words"),
    [
        (
            (10, 0),
            "3.6.0",
            "Triton 3.6.0 has no tcgen05 instruction for integers of 8 bits, 3.8 and newer have",
        ),
        ((10, 0), "3.7.1+git1234", "Triton 3.7.1+git1234 has no"),
        ((10, 3), "3.6.0", "Triton 3.6.0 has no"),
        ((10, 3), "3.9.0", "on compute capability 10.0 alone, got 10.3"),
        ((11, 0), "3.10.0", "on compute capability 10.0 alone, got 11.0"),
        ((10, 0), "3.8.0", None),
        ((10, 0), "3.10.0", None),
        ((9, 0), "3.6.0", None),
        ((12, 0), "3.6.0", None),
        ((8, 0), "3.6.0", None),
        ("gfx942", "3.6.0", None),
    ],
)
def test_who_is_left_to_older_instructions(gpu, version, words):
    reason = older_instructions(gpu, version)
    assert reason is None if words is None else words in reason


def test_it_is_said_once_and_only_where_it_is_so(caplog):
    warn_of_older_instructions.cache_clear()
    for gpu in ((10, 0), (9, 0), (10, 0)):
        warn_of_older_instructions(gpu, "3.6.0")
    assert [record.message for record in caplog.records] == [
        "quantized attention may be slower here than that in 16 bits: "
        "Triton 3.6.0 has no tcgen05 instruction for integers of 8 bits, 3.8 and newer have"
    ]
