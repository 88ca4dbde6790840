"""A recipe's adapter: as if its LoRA were in the weights, whatever else is done to the model."""

import dataclasses

import accelerate
import lora_files
import pytest
import torch
from fused_projections import CANNOT_FUSE

from dit_accel.errors import UnavailableError
from dit_accel.runtime.switching import accelerated, enable


@pytest.fixture
def tuned(case, tmp_path):
    """The recipe of the family with an adapter."""
    folder = lora_files.save(case.make().transformer, tmp_path / "tuned")
    return dataclasses.replace(case.recipe, adapter=folder)


def acts(case, recipe, feature, enabled_first=False):
    """The feature and the adapter together, and after `disable` only the feature, bit for bit."""
    expected = case.make()
    lora_files.add(expected.transformer)
    feature(expected)
    case.mask(expected.transformer)
    untouched = case.run(case.untouched(feature), steps=1)
    pipe = case.make()
    if not enabled_first:
        feature(pipe)
    with accelerated(pipe, recipe):
        if enabled_first:
            feature(pipe)
        actual = case.run(pipe, steps=1)
    torch.testing.assert_close(actual, case.run(expected, steps=1), rtol=1e-3, atol=1e-4)
    with accelerated(pipe, case.recipe):
        assert not torch.allclose(actual, case.run(pipe, steps=1), atol=1e-2)
    assert torch.equal(case.run(pipe, steps=1), untouched)


@pytest.mark.feature("A recipe's `adapter` beside LoRA of one's own, whose scale stays")
def test_beside_lora_of_ones_own(case, tuned):
    def own(pipe):
        lora_files.load(pipe.transformer, "own", scale=0.5)

    for enabled_first in (False, True):
        acts(case, tuned, own, enabled_first)


@pytest.mark.feature("A recipe's `adapter` under sequential offload (accelerate)")
def test_under_sequential_offload(case, tuned, cell):
    def offload(pipe):
        accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))

    if case.family == "ltx2":
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            case.run(case.untouched(offload), steps=1)
        return cell.no_such_thing("accelerate cannot move its output")
    return acts(case, tuned, offload)


@pytest.mark.feature("A recipe's `adapter` with QKV projections fused")
def test_with_fused_projections(case, tuned, cell):
    pipe = case.make()
    if case.family in CANNOT_FUSE:
        error, match, why = CANNOT_FUSE[case.family]
        with pytest.raises(error, match=match):
            pipe.transformer.fuse_qkv_projections()
        return cell.no_such_thing(why)
    if hasattr(pipe.transformer, "fuse_qkv_projections"):
        pipe.transformer.fuse_qkv_projections()
    if not any(hasattr(module, "to_qkv") for module in pipe.transformer.modules()):
        return cell.no_such_thing("diffusers fuses nothing here")
    with cell.refused(UnavailableError, r"are fused .* `unfuse_qkv_projections\(\)`", "unfuse them"):
        enable(pipe, tuned)
    return None
