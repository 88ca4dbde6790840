"""The check tells right from wrong: in one element, the log-sum-exp, the second call, the text lengths."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from dit_accel.evals.gpu_bench import checks
from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse.tuned import Launch

ROOT = Path(__file__).parents[3]
RIGHT = partial(block_sparse_attention, backend="gather", return_lse=True)


def check(run, geometry=checks.GEOMETRIES[0], dtype=torch.bfloat16):
    return checks.check(run, geometry, 16, dtype, "cpu")


@pytest.mark.parametrize("geometry", checks.GEOMETRIES, ids=lambda geometry: geometry.name)
@pytest.mark.parametrize("dtype", checks.DTYPES.values(), ids=checks.DTYPES)
def test_what_is_right_passes(geometry, dtype):
    row = check(RIGHT, geometry, dtype)
    assert row["right"], row
    assert 0 < row["error"] <= 1


def test_geometries_have_full_and_partial_blocks_text_and_a_ragged_end():
    masks = [g.pattern.block_mask(g.layout, checks.BLOCK_SIZE) for g in checks.GEOMETRIES]
    assert any(mask.num_full for mask in masks)
    assert any(mask.num_partial for mask in masks)
    assert {g.layout.text_first for g in checks.GEOMETRIES if g.layout.text_len} == {True, False}
    assert any(mask.seq_len % 128 for mask in masks)


def changed(place, by=0.5):
    def run(*inputs, **options):
        out, lse = RIGHT(*inputs, **options)
        (out if place == "out" else lse)[0, 0, -1] += by
        return out, lse

    return run


@pytest.mark.parametrize("place", ["out", "lse"])
def test_one_wrong_row_is_wrong(place):
    row = check(changed(place))
    assert not row["right"]
    assert row["error" if place == "out" else "lse_error"] > 1


def test_not_a_number_is_wrong():
    assert not check(changed("out", torch.nan))["right"]


def test_another_result_the_second_time_is_wrong():
    calls = []

    def run(*inputs, **options):
        out, lse = RIGHT(*inputs, **options)
        calls.append(1)
        return out * (1 + 2**-8 * (len(calls) > 1)), lse

    row = check(run)
    assert row["error"] <= 1
    assert not row["repeats"]
    assert not row["right"]


def test_lengths_of_text_are_asked_for_and_lie_apart_in_memory():
    seen = []

    def run(*inputs, text_valid):
        seen.append(text_valid)
        return RIGHT(*inputs)  # as if there were none

    assert not check(run)["right"]
    assert seen[0].stride(0) == 2
    assert len(seen[0].unique()) == 2


def with_wrong_gradients(*inputs, **options):
    """Right but for what goes back to the key before the text."""
    q, k, v, mask = inputs
    key, v = mask.text[0] - 1, v.clone()
    v[:, :, key] = v[:, :, key].detach()
    return RIGHT(q, k, v, mask, **options)


def test_gradients_that_are_right_pass_and_others_do_not():
    half, single = torch.bfloat16, torch.float32
    for run, dtype in ((RIGHT, half), (RIGHT, single), (with_wrong_gradients, single)):
        row = checks.check_gradients(run, checks.GEOMETRIES[0], 16, dtype, "cpu")
        assert row["right"] == (run is RIGHT), row
        assert row["repeats"]


def interpreted(code):
    """Runs code as on a GPU, by Triton's interpreter."""
    pytest.importorskip("triton")
    code = "from dit_accel.evals.gpu_bench import peers\nassert peers.kernel('cpu') == 'triton'\n" + code
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this Triton needs numpy < 2.4")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launch", [(64, 32, 4, 2), (128, 64, 8, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_launch_of_the_kernel_itself(launch, dtype):
    interpreted(
        "from dit_accel.evals.gpu_bench import checks\n"
        f"(row,) = checks.run_launch('cpu', {list(launch)}, {dtype!r}, [64])\n"
        "assert row['right'], row\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", ["dq", "dkv"])
@pytest.mark.parametrize("kernel", ["pointer", "tma"])
def test_a_launch_of_the_backward_pass_itself(kernel, part):
    """Checked in 16 bits; timed, its kernel alone, as a rehearsal of the real thing."""
    launch = [*Launch(64, 32, 4, 2, kernel, part=part)]
    interpreted(
        "import torch\n"
        "from dit_accel.evals.gpu_bench import attention, backward_launches, cases\n"
        f"(row,) = backward_launches.run_check('cpu', {launch}, 'fp16', [64])\n"
        "assert row['right'] and row['repeats'], row\n"
        "attention.dtype_on = lambda device: torch.float16\n"
        "case = cases.REHEARSAL['tuning'][64][0]\n"
        f"(row,) = backward_launches.run('cpu', [case.name, case.preset], {launch})\n"
        f"assert row['launch'] == {launch} and row['tflops'] > 0, row\n"
    )
