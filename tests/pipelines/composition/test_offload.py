"""Weights kept elsewhere than where the model runs.

Without a GPU the hooks of accelerate and diffusers are installed with the CPU as the device that runs, which
shows that they wrap an accelerated transformer and are wrapped by it; the transfers need a GPU.
"""

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading

from dit_accel.runtime.switching import accelerated

CPU = torch.device("cpu")


@pytest.mark.feature("Model offload hook (accelerate), before enable")
def test_model_offload(case):
    case.works(model_offload)


@pytest.mark.feature("Model offload hook (accelerate), while enabled")
def test_model_offload_while_enabled(case):
    case.works(model_offload, enabled_first=True)


def model_offload(pipe):
    accelerate.cpu_offload_with_hook(pipe.transformer, execution_device=CPU)


@pytest.mark.feature("Sequential offload (accelerate), before enable")
def test_sequential_offload(case, cell):
    if is_possible(case, cell):
        case.works(sequential_offload)


@pytest.mark.feature("Sequential offload (accelerate), while enabled")
def test_sequential_offload_while_enabled(case, cell):
    if is_possible(case, cell):
        case.works(sequential_offload, enabled_first=True)


def is_possible(case, cell) -> bool:
    """LTX-2's output is of a class that cannot be made of a dictionary, as accelerate does it."""
    if case.family != "ltx2":
        return True
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        case.run(case.untouched(sequential_offload), steps=1)
    cell.no_such_thing("accelerate cannot move its output")
    return False


def sequential_offload(pipe):
    accelerate.cpu_offload(pipe.transformer, execution_device=CPU)
    assert all(p.device.type == "meta" for p in pipe.transformer.parameters())


@pytest.mark.feature("Group offload by block")
def test_group_offload_by_block(case):
    for enabled_first in (False, True):
        case.works(lambda pipe: group_offload(pipe, "block_level", num_blocks_per_group=1), enabled_first)


@pytest.mark.feature("Group offload by leaf")
def test_group_offload_by_leaf(case):
    for enabled_first in (False, True):
        case.works(lambda pipe: group_offload(pipe, "leaf_level"), enabled_first)


def group_offload(pipe, kind, **options):
    apply_group_offloading(
        pipe.transformer, onload_device=CPU, offload_device=CPU, offload_type=kind, **options
    )


@pytest.mark.feature("`enable_model_cpu_offload` to a GPU")
def test_model_offload_to_gpu(case):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    expected = case.run(case.masked())
    pipe = case.make()
    pipe.enable_model_cpu_offload()
    with accelerated(pipe, case.recipe):
        torch.testing.assert_close(case.run(pipe).cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.feature("`enable_group_offload` to a GPU, with a stream")
def test_group_offload_to_gpu(case):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    expected = case.run(case.masked())
    pipe = case.make()
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=True
    )
    with accelerated(pipe, case.recipe):
        torch.testing.assert_close(case.run(pipe).cpu(), expected, rtol=1e-3, atol=1e-3)
